// The kernels for AVX2 with FMA. The headers come before the target region: nothing of theirs may be compiled for it,
// or the linker could pick that copy for a CPU without AVX2.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>
#include <vector>

#include "target.h"
SFACE_TARGET_BEGIN("avx2,fma,popcnt,bmi")
namespace sface::avx2 {
namespace {
#include "isa_avx2.h"

#include "pack.inl"

#include "../device_math.h"
#include "vectors.inl"

#include "dense.inl"
#include "screen.inl"

#include "kernels.inl"
}  // namespace
extern const Kernels* const table = &kTable;
}  // namespace sface::avx2
SFACE_TARGET_END
#endif
