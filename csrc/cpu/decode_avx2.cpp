// How avx2 decodes a row; setup.py compiles this file with its flags.
#define MFT_DECODE avx2_decode
#include "decode.inl"
