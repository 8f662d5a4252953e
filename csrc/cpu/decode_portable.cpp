// The decoder for any machine.
#define MFT_DECODE portable_decode
#include "decode.inl"
