// The kernels for few tokens for avx512_bf16; building/cpu.py compiles this file with its flags.
#define MFT_FEW_KERNELS avx512_bf16_few_kernels
#include "few_tokens.inl"
