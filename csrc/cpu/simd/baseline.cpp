// The kernels for every CPU that the compiler's default flags allow: 128-bit vectors in SSE2, NEON or plain C++.
#include "../kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstring>
#include <vector>

namespace sface::baseline {
namespace {
constexpr const char* kName = "baseline";
constexpr int kStreams = 1;
constexpr int kLanes = 4;
constexpr int kStripRows = 6;
constexpr int kPanelVectors = 2;

typedef float F32 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t I32 __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t U32 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int16_t I16 __attribute__((vector_size(8), aligned(2), may_alias));

SFACE_INLINE F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
SFACE_INLINE I32 select(I32 mask, I32 yes, I32 no) { return mask ? yes : no; }
SFACE_INLINE F32 larger(F32 a, F32 b) { return a > b ? a : b; }
SFACE_INLINE F32 smaller(F32 a, F32 b) { return a < b ? a : b; }
// Halves on halves, in the same order on every instruction set.
SFACE_INLINE float sum_lanes(F32 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
SFACE_INLINE void sum_lanes4(const F32 v[4], float out[4]) {
  for (int i = 0; i < 4; ++i) out[i] = sum_lanes(v[i]);
}
SFACE_INLINE float largest_lane(F32 v) {
  const float even = v[0] > v[2] ? v[0] : v[2], odd = v[1] > v[3] ? v[1] : v[3];
  return even > odd ? even : odd;
}

#if defined(__SSE2__)
SFACE_INLINE I32 dot_int16(I32 acc, I32 x, I32 w) { return acc + I32(_mm_madd_epi16(__m128i(x), __m128i(w))); }
SFACE_INLINE uint32_t bits(I32 mask) { return static_cast<uint32_t>(_mm_movemask_ps(__m128(mask))); }
SFACE_INLINE F32 square_root(F32 v) { return F32(_mm_sqrt_ps(__m128(v))); }
SFACE_INLINE bool can_stream(const float* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
SFACE_INLINE void stream(float* p, F32 v) { _mm_stream_ps(p, __m128(v)); }
SFACE_INLINE void finish_streams() { _mm_sfence(); }
#else
SFACE_INLINE I32 dot_int16(I32 acc, I32 x, I32 w) {
#if defined(__aarch64__)
  const int16x8_t a = vreinterpretq_s16_s32(int32x4_t(x)), b = vreinterpretq_s16_s32(int32x4_t(w));
  const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_high_s16(a, b);
  return acc + I32(vpaddq_s32(low, high));
#else
  return acc + (I32(U32(x) << 16) >> 16) * (I32(U32(w) << 16) >> 16) + (x >> 16) * (w >> 16);
#endif
}
SFACE_INLINE uint32_t bits(I32 mask) { return (mask[0] & 1u) | (mask[1] & 2u) | (mask[2] & 4u) | (mask[3] & 8u); }
SFACE_INLINE F32 square_root(F32 v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
SFACE_INLINE bool can_stream(const float*) { return true; }
SFACE_INLINE void stream(float* p, F32 v) { *reinterpret_cast<F32*>(p) = v; }
SFACE_INLINE void finish_streams() {}
#endif

#include "generic/all.inl"
}  // namespace
extern const Kernels* const table = &kTable;
}  // namespace sface::baseline
