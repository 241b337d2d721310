// The int8 screen on 512-bit vectors: how rows become bytes, and what is done with the products.
//
// As screen.inl: every pair once, w read once, cosines in registers only. A pair is a candidate where
//
//   c̃ + α_i + β_j (1 + max α) ≥ cos θ_ε      c̃ = X_i·W_j / (S_i S_j), |c̃ − c| ≤ α_i + β_j + α_i β_j   (docs/math.md, 3)
//
// The instructions multiply unsigned by signed bytes: W_j + 128 stands in memory, and each sum starts from −128 Σ_d
// X_id. Included after screen.inl, by the file that has the products.

constexpr float kInt8Largest = 127.0f;
// Where the rounding of products with S, and of sums of squares in fp32, is put on top of a measured error (math.md,
// 3).
constexpr float kInt8Relative = 1.001f, kInt8Absolute = 4e-5f;
constexpr int kInt8Offset = 128;
// Shorter ones have no scale in fp32; after normalisation nothing of them is left.
constexpr float kInt8Smallest = 1e-30f;

inline int int8_depth(int d) { return (d + kInt8Pad - 1) / kInt8Pad * kInt8Pad; }

// How a row becomes bytes.
struct Int8Row {
  float factor;  // the row times this is rounded
  float scale;   // 1/S: a unit of a byte in the unit row
};

inline Int8Row int8_row(float largest, float inv_norm) {
  if (!(largest > kInt8Smallest)) return {0, 0};
  return {kInt8Largest / largest, largest * inv_norm / kInt8Largest};
}

// Bound of ‖W/S − ŵ‖ from the sum of squares of what rounding took.
inline float int8_error(const Int8Row& row, float square, int d) {
  if (row.scale == 0) return 1e-15f;
  const float root = __builtin_sqrtf(static_cast<float>(d));
  return (kInt8Relative * __builtin_sqrtf(square) + kInt8Absolute * root) * row.scale;
}

// Rounds, and adds to `square` what was taken away.
SFACE_INLINE I32 round_lanes(F32 v, F32& square) {
  const F32 rest = F32(_mm512_reduce_ps(__m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));  // v − round(v)
  square += rest * rest;
  return I32(_mm512_cvtps_epi32(__m512(v)));
}

// 64 features as bytes from −128 or from 0, in the order that costs the fewest instructions: a product does not see it.
SFACE_INLINE __m512i signed_bytes(const I32 v[4]) {
  return _mm512_packs_epi16(_mm512_packs_epi32(__m512i(v[0]), __m512i(v[1])),
                            _mm512_packs_epi32(__m512i(v[2]), __m512i(v[3])));
}
SFACE_INLINE __m512i unsigned_bytes(const I32 v[4]) {
  return _mm512_packus_epi16(_mm512_packs_epi32(__m512i(v[0]), __m512i(v[1])),
                             _mm512_packs_epi32(__m512i(v[2]), __m512i(v[3])));
}

inline void pack_int8(const float* rows, int count, int d, int padded_d, const Int8Samples& out) {
  const int depth = int8_depth(d);
  std::memset(out.words, 0, static_cast<size_t>(depth) * kPanel);
  for (int i = 0; i < kPanel; ++i) {
    out.start[i] = 0;
    out.scale[i] = out.error[i] = 0;
    if (i >= count) continue;
    const float* row = rows + static_cast<int64_t>(i) * padded_d;
    F32 largest{}, square{};
    I32 total{};
    for (int k = 0; k < d; k += kLanes) largest = larger(largest, absolute(load_first(row + k, d - k)));
    const Int8Row scaled = int8_row(largest_lane(largest), 1);
    for (int k = 0; k < depth; k += kInt8Pad) {
      I32 whole[4];
      for (int q = 0; q < 4; ++q) {
        const int at = k + q * kLanes;
        whole[q] = round_lanes(load_first(row + at, d - at) * scaled.factor, square);
        total += whole[q];
      }
      int32_t words[kInt8Pad / 4];
      _mm512_storeu_si512(words, signed_bytes(whole));
      for (int q = 0; q < kInt8Pad / 4; ++q) out.words[(k / 4 + q) * kPanel + i] = words[q];
    }
    out.start[i] = -kInt8Offset * _mm512_reduce_add_epi32(__m512i(total));
    out.scale[i] = scaled.scale;
    out.error[i] = int8_error(scaled, sum_lanes(square), d);
  }
}

// Four rows of a block as bytes, their scales and errors; adds inv·row of each to `sum` unless it is null.
template <bool kSum>
inline void prepare_int8_rows(const float* const rows[kRowsAtOnce], const float largest[kRowsAtOnce],
                              const float inv[kRowsAtOnce], int row, int d, float* sum, Ahead& ahead, Workspace& work) {
  const int depth = int8_depth(d);
  uint8_t* const out = work.int8.data.get() + static_cast<int64_t>(row) * depth;
  Int8Row scaled[kRowsAtOnce];
  for (int r = 0; r < kRowsAtOnce; ++r) scaled[r] = int8_row(is_finite(inv[r]) ? largest[r] : 0.0f, inv[r]);
  F32 square[kRowsAtOnce] = {};
  const auto chunk = [&](int k, const auto& load_features) __attribute__((always_inline)) {
    F32 total[4];
    if constexpr (kSum)
      for (int q = 0; q < 4; ++q) total[q] = load(sum + k + q * kLanes);
    ahead.step(kRowsAtOnce);
#pragma GCC unroll 4
    for (int r = 0; r < kRowsAtOnce; ++r) {
      I32 whole[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const F32 v = load_features(rows[r], k + q * kLanes);
        whole[q] = round_lanes(v * scaled[r].factor + static_cast<float>(kInt8Offset), square[r]);
        if constexpr (kSum) total[q] += v * inv[r];
      }
      _mm512_storeu_si512(out + static_cast<int64_t>(r) * depth + k, unsigned_bytes(whole));
    }
    if constexpr (kSum)
      for (int q = 0; q < 4; ++q) store(sum + k + q * kLanes, total[q]);
  };
  int k = 0;
  for (; k + kInt8Pad <= d; k += kInt8Pad) chunk(k, [](const float* from, int at) { return load(from + at); });
  if (k < d) chunk(k, [d](const float* from, int at) { return load_first(from + at, d - at); });
  for (int r = 0; r < kRowsAtOnce; ++r) {
    work.int8_scale[row + r] = scaled[r].scale;
    work.int8_error[row + r] = int8_error(scaled[r], sum_lanes(square[r]), d);
  }
}

// A tile's samples against the threshold and in the exponent.
struct Int8Tile {
  __m512 scale[kPanelVectors];      // 1/S_i
  __m512 threshold[kPanelVectors];  // screened cosine from which a pair is a candidate
  __m512 constant[kPanelVectors];   // of Int8Series
};

// log2(q/s) and q/s below the threshold, in a few instructions: the screened cosine's own error moves these by 1e-2.
struct Int8Series {
  static constexpr float kUnit = 8388608.0f;  // 2²³: an exponent in the place of a float's
  __m512 constant, c1, c3, c5, lowest;
  explicit Int8Series(const Rules& rules)
      : constant(_mm512_set1_ps((127 + rules.slope_log2 * (rules.hyper.b - kPi * 0.5f)) * kUnit)),
        c1(_mm512_set1_ps(rules.slope_log2 * kUnit)),
        c3(_mm512_set1_ps(rules.slope_log2 / 6 * kUnit)),
        c5(_mm512_set1_ps(rules.slope_log2 * 0.0772f * kUnit)),
        lowest(_mm512_set1_ps(kUnit)) {}

  // (4) without s: 2^t, where i = (t + 127)·2²³ as an integer is a float that is linear between powers of two, 1 + f
  // for 2^f, and a polynomial in m = 1 + f takes 2^f/(1 + f) from there, to 7e-4.
  SFACE_INLINE __m512 weight(__m512 c, __m512 with_constant) const {
    const __m512 square = _mm512_mul_ps(c, c);
    __m512 t = _mm512_fmadd_ps(square, c5, c3);
    t = _mm512_fmadd_ps(t, square, c1);
    t = _mm512_max_ps(_mm512_fmadd_ps(t, c, with_constant), lowest);
    const __m512i i = _mm512_cvtps_epi32(t);
    const __m512 m = _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(i, _mm512_set1_epi32(0x7fffff), _mm512_set1_epi32(0x3f800000), 0xEA));
    __m512 p = _mm512_fmadd_ps(m, _mm512_set1_ps(-0.106444933f), _mm512_set1_ps(0.707467641f));
    p = _mm512_fmadd_ps(p, m, _mm512_set1_ps(-1.37728854f));
    p = _mm512_fmadd_ps(p, m, _mm512_set1_ps(1.77560228f));
    return _mm512_mul_ps(p, _mm512_castsi512_ps(i));
  }
};

// The screen but for its products. What is derived from it computes them:
//
//   Products& multiply_tile(int strip, int panel, Ahead& ahead)
class Int8Sums {
 public:
  Int8Sums(const Rules& rules, const Group& group, Workspace& work)
      : group_(group), work_(work), slope_(rules.hyper.k_inter), active_cosine_(rules.active_cosine), series_(rules) {}

  void begin(const Block& block) const {
    for (int i = 0; i < group_.panels * kPanel; ++i) work_.best[i] = kNone;
    // past the last row, whatever block this thread had before: its errors have no part in this one's threshold
    for (int row = block.count; row < kBlockClasses; ++row) work_.int8_error[row] = 0;
  }

  // The best of the block among the task's.
  void end(const Block& block, RowSums& sums) const {
    const __m512i row_bits = _mm512_set1_epi32(kRowBits),
                  last = _mm512_set1_epi32(static_cast<int>(block.first) + kRowBits);
    for (int i = 0; i < group_.panels * kPanel; i += kLanes) {
      const __m512 best = _mm512_loadu_ps(work_.best.data() + i);
      const __m512i tagged = _mm512_castps_si512(best);
      // without its tag it is equal in equal classes of other blocks too
      const __m512 cosine = _mm512_castsi512_ps(_mm512_andnot_si512(row_bits, tagged));
      const __m512i product = _mm512_cvttps_epi32(_mm512_mul_ps(cosine, _mm512_set1_ps(kScale * kScale)));
      const __mmask16 better = _mm512_cmp_ps_mask(best, _mm512_set1_ps(kNone), _CMP_GT_OQ) &
                               _mm512_cmpgt_epi32_mask(product, _mm512_loadu_si512(sums.best + i));
      _mm512_mask_storeu_epi32(sums.best + i, better, product);
      _mm512_mask_storeu_epi32(sums.best_class + i, better, _mm512_sub_epi32(last, _mm512_and_si512(tagged, row_bits)));
    }
  }

 protected:
  void sum_strip(const Block& block, int strip, int panel, bool masked, const Products& products, Ahead* ahead) const {
    if (masked) {
      sum_tile<true>(block, strip, panel, products, ahead);
    } else {
      sum_tile<false>(block, strip, panel, products, ahead);
    }
  }

  const Group& group_;
  Workspace& work_;

 private:
  // Of a cosine hold its row, turned round: of equal ones the first wins, or the last where they are below 0.
  static constexpr int kRowBits = 63;
  static constexpr float kNone = -2.0f;  // no cosine
  static_assert(kBlockClasses <= kRowBits + 1);

  Int8Tile tile_of(int strip, int panel) const {
    float error = 0;
    for (int r = strip * kStripRows; r < (strip + 1) * kStripRows; ++r)
      error = work_.int8_error[r] > error ? work_.int8_error[r] : error;
    error *= 1 + group_.int8_worst_error;
    Int8Tile tile;
    const __m512 limit = _mm512_set1_ps(active_cosine_ - error);
    // E exp(k·error of the cosine) for an error of variance (α² + β²)/D, in the exponent
    const __m512 spread = _mm512_set1_ps(-0.5f * slope_ * slope_ / group_.d * kLog2E * Int8Series::kUnit);
    for (int v = 0; v < kPanelVectors; ++v) {
      const int at = panel * kPanel + v * kLanes;
      const __m512 own = _mm512_loadu_ps(group_.int8.error + at);
      tile.scale[v] = _mm512_loadu_ps(group_.int8.scale + at);
      tile.threshold[v] = _mm512_sub_ps(limit, own);
      tile.constant[v] =
          _mm512_fmadd_ps(spread, _mm512_fmadd_ps(own, own, _mm512_set1_ps(error * error)), series_.constant);
    }
    return tile;
  }

  template <bool kMasked>
  SFACE_INLINE void sum_tile(const Block& block, int strip, int panel, const Products& products, Ahead* ahead) const {
    const int first_row = strip * kStripRows, at = panel * kPanel;
    const Int8Tile tile = tile_of(strip, panel);
    __m512 loss[kPanelVectors], weights[kPanelVectors], best[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) {
      loss[v] = _mm512_loadu_ps(work_.below.data() + at + v * kLanes);
      weights[v] = _mm512_loadu_ps(work_.below_weight.data() + at + v * kLanes);
      best[v] = _mm512_loadu_ps(work_.best.data() + at + v * kLanes);
    }
#pragma GCC unroll 2
    for (int row = 0; row < kStripRows; ++row) {
      const __m512 scale = _mm512_set1_ps(work_.int8_scale[first_row + row]);
      const __m512i tag = _mm512_set1_epi32(kRowBits - (first_row + row));
      uint32_t below = 0;
      if (ahead) ahead->step();
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) {
        const __m512i product = __m512i(products.sum[row][v]);
        __m512 c = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(product), tile.scale[v]), scale);
        if constexpr (kMasked)
          c = _mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(product, _mm512_set1_epi32(INT32_MAX)), c,
                                   _mm512_set1_ps(2));
        const __mmask16 counted = _mm512_cmp_ps_mask(c, tile.threshold[v], _CMP_LT_OQ);
        __m512 weight = series_.weight(c, tile.constant[v]);
        weight = _mm512_fnmadd_ps(weight, weight, weight);  // 1/(1 + 1/e) up to e²
        loss[v] = _mm512_mask3_fmadd_ps(weight, c, loss[v], counted);
        weights[v] = _mm512_mask_add_ps(weights[v], counted, weights[v], weight);
        const __m512 tagged = _mm512_castsi512_ps(
            _mm512_ternarylogic_epi32(_mm512_castps_si512(c), _mm512_set1_epi32(~kRowBits), tag, 0xEA));
        best[v] = _mm512_mask_max_ps(best[v], counted, best[v], tagged);
        below |= static_cast<uint32_t>(counted) << (v * kLanes);
      }
      work_.candidates[(first_row + row) * group_.panels + panel] = ~below;
    }
    for (int v = 0; v < kPanelVectors; ++v) {
      _mm512_storeu_ps(work_.below.data() + at + v * kLanes, loss[v]);
      _mm512_storeu_ps(work_.below_weight.data() + at + v * kLanes, weights[v]);
      _mm512_storeu_ps(work_.best.data() + at + v * kLanes, best[v]);
    }
  }

  float slope_, active_cosine_;
  Int8Series series_;
};

// What kernels.inl asks of an int8 screen before its products.
struct Int8Preparation {
  static constexpr decltype(Kernels::pack_int8) pack = pack_int8;

  static void prepare_rows(const float* const rows[kRowsAtOnce], const float largest[kRowsAtOnce],
                           const float inv[kRowsAtOnce], int row, int d, float* sum, Ahead& ahead, Workspace& work) {
    if (sum) {
      prepare_int8_rows<true>(rows, largest, inv, row, d, sum, ahead, work);
    } else {
      prepare_int8_rows<false>(rows, largest, inv, row, d, sum, ahead, work);
    }
  }

 protected:
  // `share` of the next block is fetched while the rows of this one are prepared.
  static void plan_share(const Group& group, double share, Ahead& ahead) {
    const int64_t steps = int64_t{kBlockClasses} * ((group.d + kInt8Pad - 1) / kInt8Pad);
    ahead.plan(static_cast<int64_t>(ahead.left * share), steps);
  }
};
