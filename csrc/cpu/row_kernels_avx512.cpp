// The row kernels for avx512; building/cpu.py compiles this file with its flags.
#define MFT_ROW_KERNELS avx512_row_kernels
#include "row_kernels.inl"
