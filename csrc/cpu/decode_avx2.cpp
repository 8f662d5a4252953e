// The decoder for avx2; building/cpu.py compiles this file with its flags.
#define MFT_DECODE avx2_decode
#include "decode.inl"
