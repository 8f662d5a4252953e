// The kernels for few tokens for avx2; building/cpu.py compiles this file with its flags.
#define MFT_FEW_KERNELS avx2_few_kernels
#include "few_tokens.inl"
