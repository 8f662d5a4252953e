// The row kernels for avx2; building/cpu.py compiles this file with its flags.
#define MFT_ROW_KERNELS avx2_row_kernels
#include "row_kernels.inl"
