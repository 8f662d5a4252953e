// The kernels for few tokens for avx512; setup.py compiles this file with its flags.
#define MFT_FEW_KERNELS avx512_few_kernels
// Beyond so many tokens gemm_float32.cpp is ahead.
#define MFT_MOST_DOT {48, 48, 48}  // fp32, bf16, fp16
#define MFT_MOST_SUM {48, 48, 48}
#include "few_tokens.inl"
