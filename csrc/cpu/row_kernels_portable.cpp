// The row kernels for any machine.
#define MFT_ROW_KERNELS portable_row_kernels
#define MFT_ROW_KERNELS_NAME "portable"
#include "row_kernels.inl"
