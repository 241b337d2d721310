// The kernels for AVX-512 with VNNI: 512-bit vectors, and vpdpwssd and vpdpbusd, the int16 or int8 products and sums of
// a lane in one instruction. The headers come before the target region: nothing of theirs may be compiled for it, or
// the linker could pick that copy for a CPU without it.
#include "../kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>
#include <vector>

#include "target.h"
#define SFACE_FEATURES(feature, separator)                                                      \
  feature("avx2") separator feature("fma") separator feature("popcnt") separator feature("bmi") \
      separator feature("avx512f") separator feature("avx512bw") separator feature("avx512dq")  \
          separator feature("avx512vl") separator feature("avx512vnni")

namespace sface::avx512 {
bool supported() { return SFACE_SUPPORTED(SFACE_FEATURES); }
}  // namespace sface::avx512

SFACE_TARGET_BEGIN(SFACE_FEATURES)
namespace sface::avx512 {
namespace {
constexpr const char* kName = "avx512_vnni";
constexpr int kStreams = 1;

#include "avx512_vectors.inl"

#define SFACE_INT8 "../vnni_int8.inl"
#define SFACE_FAR "../avx512_far.inl"
#include "generic/all.inl"
}  // namespace
extern const Kernels* const table = &kTable;
}  // namespace sface::avx512
SFACE_TARGET_END
#endif
