// The kernels for few tokens for portable code; setup.py compiles this file with its flags.
#define MFT_FEW_KERNELS portable_few_kernels
// Slabs and torch's GEMM, which has all vectors of Sapphire Rapids, are level there (1536 x 1536, one thread).
#define MFT_MOST_DOT {10, 8, 4}  // fp32, bf16, fp16
#define MFT_MOST_SUM {10, 8, 4}
#include "few_tokens.inl"
