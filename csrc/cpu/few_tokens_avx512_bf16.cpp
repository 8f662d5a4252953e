// The kernels for few tokens for avx512_bf16; setup.py compiles this file with its flags.
#define MFT_FEW_KERNELS avx512_bf16_few_kernels
// Beyond so many tokens gemm_float32.cpp and gemm_bfloat16.cpp are ahead.
#define MFT_MOST_DOT {48, 16, 48}  // fp32, bf16, fp16
#define MFT_MOST_SUM {48, 16, 48}
#include "few_tokens.inl"
