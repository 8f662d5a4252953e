// The row kernels for any machine.
#define MFT_ROW_KERNELS portable_row_kernels
#include "row_kernels.inl"
