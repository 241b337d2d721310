// The kernels for AVX2 with FMA: 256-bit vectors. The headers come before the target region: nothing of theirs may be
// compiled for it, or the linker could pick that copy for a CPU without AVX2.
#include "../kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>
#include <vector>

#include "target.h"
#define SFACE_FEATURES(feature, separator) \
  feature("avx2") separator feature("fma") separator feature("popcnt") separator feature("bmi")

namespace sface::avx2 {
bool supported() { return SFACE_SUPPORTED(SFACE_FEATURES); }
}  // namespace sface::avx2

SFACE_TARGET_BEGIN(SFACE_FEATURES)
namespace sface::avx2 {
namespace {
constexpr const char* kName = "avx2";
constexpr int kStreams = 1;
constexpr int kLanes = 8;
constexpr int kStripRows = 6;  // 6 × 2 accumulators, 2 sample vectors, 1 broadcast, 1 product: 16 registers
constexpr int kPanelVectors = 2;

typedef float F32 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t I32 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t U32 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int16_t I16 __attribute__((vector_size(16), aligned(2), may_alias));

// acc + x₀w₀ + x₁w₁ of the two int16 in each lane, exact
SFACE_INLINE I32 dot_int16(I32 acc, I32 x, I32 w) { return acc + I32(_mm256_madd_epi16(__m256i(x), __m256i(w))); }
SFACE_INLINE uint32_t bits(I32 mask) { return static_cast<uint32_t>(_mm256_movemask_ps(__m256(mask))); }
SFACE_INLINE F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
SFACE_INLINE I32 select(I32 mask, I32 yes, I32 no) { return mask ? yes : no; }
SFACE_INLINE F32 square_root(F32 v) { return F32(_mm256_sqrt_ps(__m256(v))); }
SFACE_INLINE F32 larger(F32 a, F32 b) { return F32(_mm256_max_ps(__m256(a), __m256(b))); }
SFACE_INLINE F32 smaller(F32 a, F32 b) { return F32(_mm256_min_ps(__m256(a), __m256(b))); }
// Halves on halves, in the same order on every instruction set.
SFACE_INLINE float sum_lanes(F32 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(__m256(v)), _mm256_extractf128_ps(__m256(v), 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
SFACE_INLINE void sum_lanes4(const F32 v[4], float out[4]) {
  for (int i = 0; i < 4; ++i) out[i] = sum_lanes(v[i]);
}
SFACE_INLINE float largest_lane(F32 v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(__m256(v)), _mm256_extractf128_ps(__m256(v), 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
SFACE_INLINE bool can_stream(const float* p) { return reinterpret_cast<uintptr_t>(p) % 32 == 0; }
SFACE_INLINE void stream(float* p, F32 v) { _mm256_stream_ps(p, __m256(v)); }
SFACE_INLINE void finish_streams() { _mm_sfence(); }

#include "generic/all.inl"
}  // namespace
extern const Kernels* const table = &kTable;
}  // namespace sface::avx2
SFACE_TARGET_END
#endif
