// The kernels for few tokens for any machine.
#define MFT_FEW_KERNELS portable_few_kernels
#include "few_tokens.inl"
