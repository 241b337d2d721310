// The kernels for AVX-512 with VNNI: 512-bit vectors, and vpdpwssd, the int16 products and sums of a lane in one
// instruction. The headers come before the target region: nothing of theirs may be compiled for it, or the linker could
// pick that copy for a CPU without it.
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
constexpr int kLanes = 16;
constexpr int kStripRows = 12;  // 12 × 2 accumulators, 2 sample vectors, 1 broadcast of 32 registers
constexpr int kPanelVectors = 2;

typedef float F32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t I32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t U32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int16_t I16 __attribute__((vector_size(32), aligned(2), may_alias));

SFACE_INLINE I32 dot_int16(I32 acc, I32 x, I32 w) {
  return I32(_mm512_dpwssd_epi32(__m512i(acc), __m512i(x), __m512i(w)));
}
SFACE_INLINE uint32_t bits(I32 mask) { return static_cast<uint32_t>(_mm512_movepi32_mask(__m512i(mask))); }
SFACE_INLINE F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
SFACE_INLINE I32 select(I32 mask, I32 yes, I32 no) { return mask ? yes : no; }
SFACE_INLINE F32 square_root(F32 v) { return F32(_mm512_sqrt_ps(__m512(v))); }
SFACE_INLINE F32 larger(F32 a, F32 b) { return F32(_mm512_max_ps(__m512(a), __m512(b))); }
SFACE_INLINE F32 smaller(F32 a, F32 b) { return F32(_mm512_min_ps(__m512(a), __m512(b))); }
SFACE_INLINE bool can_stream(const float* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }
SFACE_INLINE void stream(float* p, F32 v) { _mm512_stream_ps(p, __m512(v)); }
SFACE_INLINE void finish_streams() { _mm_sfence(); }

#include "generic/all.inl"
}  // namespace
extern const Kernels* const table = &kTable;
}  // namespace sface::avx512
SFACE_TARGET_END
#endif
