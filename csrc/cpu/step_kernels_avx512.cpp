// The kernels of an optimiser step for avx512; building/cpu.py compiles this file with its flags.
#define MFT_STEP_KERNELS avx512_step_kernels
#include "step_kernels.inl"
