// The kernels for few tokens for portable code; setup.py compiles this file with its flags.
#define MFT_FEW_KERNELS portable_few_kernels
#include "few_tokens.inl"
