// How avx512_bf16 decodes a row; setup.py compiles this file with its flags.
#define MFT_DECODE avx512_bf16_decode
#include "decode.inl"
