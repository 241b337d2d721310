// A few vectors that go through the same steps, so that one's latency hides behind the others'. Included per
// instruction set, first.

SFACE_INLINE F32 broadcast(float value) { return value - F32{}; }  // unlike 0 + value, free of an addition
SFACE_INLINE I32 broadcast_int(int32_t value) { return I32{} + value; }
SFACE_INLINE F32 absolute(F32 a) { return F32(I32(a) & broadcast_int(0x7fffffff)); }
SFACE_INLINE F32 at_least(F32 a, float low) { return larger(a, broadcast(low)); }
SFACE_INLINE F32 clamp(F32 a, float low, float high) { return smaller(larger(a, broadcast(low)), broadcast(high)); }
SFACE_INLINE F32 if_less(float bound, F32 a, F32 yes, F32 no) { return select(I32(a > bound), yes, no); }
// power·2^n, n in the low bits of `shifted`; unsigned, as what is discarded later may overflow
SFACE_INLINE F32 times_power_of_two(F32 power, F32 shifted) { return F32(U32(power) + (U32(shifted) << 23)); }

template <int kCount>
struct Pack {
  F32 v[kCount];
};

template <int kCount, typename Step>
SFACE_INLINE Pack<kCount> each(const Step& step) {
  Pack<kCount> out;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) out.v[i] = step(i);
  return out;
}

template <int K>
SFACE_INLINE Pack<K> operator+(Pack<K> a, Pack<K> b) {
  return each<K>([&](int i) { return a.v[i] + b.v[i]; });
}
template <int K>
SFACE_INLINE Pack<K> operator+(Pack<K> a, float b) {
  return each<K>([&](int i) { return a.v[i] + b; });
}
template <int K>
SFACE_INLINE Pack<K> operator+(float a, Pack<K> b) {
  return b + a;
}
template <int K>
SFACE_INLINE Pack<K> operator-(Pack<K> a, Pack<K> b) {
  return each<K>([&](int i) { return a.v[i] - b.v[i]; });
}
template <int K>
SFACE_INLINE Pack<K> operator-(Pack<K> a, float b) {
  return a + -b;
}
template <int K>
SFACE_INLINE Pack<K> operator-(float a, Pack<K> b) {
  return each<K>([&](int i) { return a - b.v[i]; });
}
template <int K>
SFACE_INLINE Pack<K> operator*(Pack<K> a, Pack<K> b) {
  return each<K>([&](int i) { return a.v[i] * b.v[i]; });
}
template <int K>
SFACE_INLINE Pack<K> operator*(Pack<K> a, float b) {
  return each<K>([&](int i) { return a.v[i] * b; });
}
template <int K>
SFACE_INLINE Pack<K> operator*(float a, Pack<K> b) {
  return b * a;
}
template <int K>
SFACE_INLINE Pack<K> operator/(float a, Pack<K> b) {
  return each<K>([&](int i) { return a / b.v[i]; });
}
template <int K>
SFACE_INLINE Pack<K> absolute(Pack<K> a) {
  return each<K>([&](int i) { return absolute(a.v[i]); });
}
template <int K>
SFACE_INLINE Pack<K> square_root(Pack<K> a) {
  return each<K>([&](int i) { return square_root(a.v[i]); });
}
template <int K>
SFACE_INLINE Pack<K> at_least(Pack<K> a, float low) {
  return each<K>([&](int i) { return at_least(a.v[i], low); });
}
template <int K>
SFACE_INLINE Pack<K> clamp(Pack<K> a, float low, float high) {
  return each<K>([&](int i) { return clamp(a.v[i], low, high); });
}
template <int K>
SFACE_INLINE Pack<K> if_less(float bound, Pack<K> a, Pack<K> yes, Pack<K> no) {
  return each<K>([&](int i) { return if_less(bound, a.v[i], yes.v[i], no.v[i]); });
}
template <int K>
SFACE_INLINE Pack<K> times_power_of_two(Pack<K> power, Pack<K> shifted) {
  return each<K>([&](int i) { return times_power_of_two(power.v[i], shifted.v[i]); });
}
