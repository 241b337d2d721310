// 512-bit vectors, for every file of this folder whose instruction set has them.
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
// Halves on halves, in the same order on every instruction set.
SFACE_INLINE float sum_lanes(F32 v) { return _mm512_reduce_add_ps(__m512(v)); }
// Of four vectors together, the same additions.
SFACE_INLINE void sum_lanes4(const F32 v[4], float out[4]) {
  const auto halves = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const __m512 a = halves(__m512(v[0]), __m512(v[1])), b = halves(__m512(v[2]), __m512(v[3]));  // 8 lanes of each
  __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, sum)));
}
SFACE_INLINE float largest_lane(F32 v) { return _mm512_reduce_max_ps(__m512(v)); }
// The first `count` lanes, the others 0 and not read.
SFACE_INLINE F32 load_first(const float* p, int count) {
  if (count >= kLanes) return F32(_mm512_loadu_ps(p));
  return F32(_mm512_maskz_loadu_ps(static_cast<__mmask16>(count > 0 ? (1u << count) - 1 : 0), p));
}
SFACE_INLINE bool can_stream(const float* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }
SFACE_INLINE void stream(float* p, F32 v) { _mm512_stream_ps(p, __m512(v)); }
SFACE_INLINE void finish_streams() { _mm_sfence(); }
