// The decoder for avx512; building/cpu.py compiles this file with its flags.
#define MFT_DECODE avx512_decode
#include "decode.inl"
