// The kernels for few tokens for avx2; setup.py compiles this file with its flags.
#define MFT_FEW_KERNELS avx2_few_kernels
// Sapphire Rapids held back to AVX2, 1536 x 1536, one thread: torch's 16-bit GEMM takes three times as long whatever
// the number of tokens (d_x 17 times and more), in fp32 it is level at 28.
#define MFT_MOST_DOT {24, kAnyNumber, kAnyNumber}  // fp32, bf16, fp16
#define MFT_MOST_SUM {24, kAnyNumber, kAnyNumber}
#include "few_tokens.inl"
