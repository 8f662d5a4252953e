// The decoder for avx512_bf16; building/cpu.py compiles this file with its flags.
#define MFT_DECODE avx512_bf16_decode
#include "decode.inl"
