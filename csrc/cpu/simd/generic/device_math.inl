// Equations (2)–(4) on vectors of lanes, once for every instruction set.
//
// Included inside a namespace that has defined F32 (simd/*.cpp) and Pack (pack.inl); that is why there is no include
// guard and no #include. V is F32 or a Pack of several: their operations interleave, which hides the latency of these
// long chains. Errors are of about one float rounding of θ, as in the reference module.

constexpr float kPi = 3.14159265358979323846f;
constexpr float kLog2E = 1.44269504088896340736f;

// 2^t for t in [-126, 126], relative error 2e-7. The coefficients are minimax on |f| ≤ 1/2.
template <typename V>
SFACE_INLINE V exp2_in_range(V t) {
  constexpr float kRound = 12582912.0f;  // 1.5·2²³: adding it leaves round(t) in the low bits
  const V shifted = t + kRound;
  const V f = t - (shifted - kRound);
  V power = f * 0.00132764715f + 0.00967554133f;
  power = power * f + 0.0555071327f;
  power = power * f + 0.240221197f;
  power = power * f + 0.693146967f;
  power = power * f + 1.00000007f;
  return times_power_of_two(power, shifted);
}

// asin(r)/r − 1 over r², for |r| ≤ 1/2
template <typename V>
SFACE_INLINE V asin_series(V square) {
  V p = square * 4.2163199048e-2f + 2.4181311049e-2f;
  p = p * square + 4.5470025998e-2f;
  p = p * square + 7.4953002686e-2f;
  p = p * square + 1.6666752422e-1f;
  return p * square;
}

// (2), over [-1, 1]
template <typename V>
SFACE_INLINE V arccos(V c) {
  const V a = absolute(c);
  const V square = if_less(0.5f, a, (1.0f - a) * 0.5f, c * c);
  const V root = if_less(0.5f, a, square_root(square), c);
  const V asin = root + root * asin_series(square);
  const V near_one = if_less(0.0f, c, 2.0f * asin, kPi - 2.0f * asin);
  return if_less(0.5f, a, near_one, kPi * 0.5f - asin);
}

// sigmoid(slope·(centre − θ)) with slope_log2 = slope·log2(e): (4) without s, and (3) with a negative slope.
template <typename V>
SFACE_INLINE V sigmoid_of_angle(V theta, float slope_log2, float centre) {
  const V t = clamp((theta - centre) * slope_log2, -126.0f, 126.0f);
  return 1.0f / (1.0f + exp2_in_range(t));
}

// slope_log2·(asin(c) + centre − π/2) as a polynomial in c: the exponent of (4), whose error is below 1e-6 for
// c ≤ 0.26 and which stays far below any exponent that counts where c is more negative.
struct BelowSeries {
  float constant, c1, c3, c5, c7, c9;
  SFACE_INLINE BelowSeries(float slope_log2, float centre)
      : constant(slope_log2 * (centre - kPi * 0.5f)),
        c1(slope_log2),
        c3(slope_log2 / 6),
        c5(slope_log2 * 3 / 40),
        c7(slope_log2 * 15 / 336),
        c9(slope_log2 * 105 / 3456) {}
};

// (4) without s where it is at most 2⁻¹⁰ and c at most 0.26.
template <typename V>
SFACE_INLINE V inter_weight_below(V c, const BelowSeries& series) {
  const V square = c * c;
  V t = square * series.c9 + series.c7;
  t = t * square + series.c5;
  t = t * square + series.c3;
  t = t * square + series.c1;
  const V e = exp2_in_range(at_least(t * c + series.constant, -126.0f));
  return e - e * e;  // 1/(1 + 1/e) up to e²
}
