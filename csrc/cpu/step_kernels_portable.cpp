// The kernels of an optimiser step for any machine.
#define MFT_STEP_KERNELS portable_step_kernels
#include "step_kernels.inl"
