// How avx512 decodes a row; setup.py compiles this file with its flags.
#define MFT_DECODE avx512_decode
#include "decode.inl"
