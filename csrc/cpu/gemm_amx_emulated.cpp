// The kernel of gemm_amx.cpp with emulated tiles: what tests run where there are no real ones.
#define MFT_EMULATED_TILES
#include "gemm_amx.cpp"
