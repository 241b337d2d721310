// Everything that is compiled once per instruction set, in the order in which each part builds on those before it.
// Included inside a namespace that has defined F32, I32, I16 and what one file in `simd/` says of its vectors.
#include "pack.inl"

#include "device_math.inl"

#include "vectors.inl"

#include "dense.inl"
#include "screen.inl"
#include "update.inl"

#include "kernels.inl"
