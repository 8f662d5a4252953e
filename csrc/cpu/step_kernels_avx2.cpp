// The kernels of an optimiser step for avx2; building/cpu.py compiles this file with its flags.
#define MFT_STEP_KERNELS avx2_step_kernels
#include "step_kernels.inl"
