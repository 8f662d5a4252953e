// The kernel of gemm_amx.cpp with emulated tiles, for tests on machines without real ones.
#define MFT_EMULATED_TILES
#include "gemm_amx.cpp"
