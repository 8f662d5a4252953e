// How portable decodes a row; setup.py compiles this file with its flags.
#define MFT_DECODE portable_decode
#include "decode.inl"
