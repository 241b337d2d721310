// Loops over feature rows that every kernel uses. Included per instruction set, after pack.inl and device_math.inl.

constexpr int kPanel = kPanelVectors * kLanes;  // samples in a panel

// The memory of the next block, fetched a little with each step of this one, in kStreams places side by side.
struct Ahead {
  static constexpr int64_t kLine = 64;
  const char* from;
  int64_t apart;      // bytes between two places
  int64_t at = 0;     // bytes fetched in each
  int64_t left;       // bytes that no step is planned for
  int64_t bytes = 0;  // a step

  explicit Ahead(const Block& block)
      : from(reinterpret_cast<const char*>(block.next ? block.next : block.w)),
        left(block.next ? block.count * block.row_stride * static_cast<int64_t>(sizeof(float)) : 0) {
    apart = left / kStreams;
  }

  // So much of what is left in the next `steps`.
  void plan(int64_t total, int64_t steps) {
    bytes = total / steps;
    left -= bytes * steps;
  }
  SFACE_INLINE void step(int steps = 1) {
    const int64_t end = at + bytes * steps / kStreams;
    for (int64_t line = (at + kLine - 1) / kLine * kLine; line < end; line += kLine)
      for (int stream = 0; stream < kStreams; ++stream) __builtin_prefetch(from + stream * apart + line, 0, 2);
    at = end;
  }
};

SFACE_INLINE F32 load(const float* p) { return *reinterpret_cast<const F32*>(p); }
SFACE_INLINE void store(float* p, F32 v) { *reinterpret_cast<F32*>(p) = v; }
SFACE_INLINE I32 load_int(const int32_t* p) { return *reinterpret_cast<const I32*>(p); }
SFACE_INLINE void store_int(int32_t* p, I32 v) { *reinterpret_cast<I32*>(p) = v; }

float dot(const float* x, const float* y, int d) {
  F32 sum[4] = {};
  int k = 0;
  for (; k + 4 * kLanes <= d; k += 4 * kLanes)
    for (int i = 0; i < 4; ++i) sum[i] += load(x + k + i * kLanes) * load(y + k + i * kLanes);
  for (; k + kLanes <= d; k += kLanes) sum[0] += load(x + k) * load(y + k);
  float total = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; k < d; ++k) total += x[k] * y[k];
  return total;
}

// The features of dot4 that fill no vector; by itself, or its code would stand in every caller's way.
__attribute__((noinline, cold)) void add_rest(const float* const x[4], const float* const w[4], int64_t k, int d,
                                              float out[4]) {
  for (int i = 0; i < 4; ++i)
    for (int64_t r = k; r < d; ++r) out[i] += x[i][r] * w[i][r];
}

// Four dot products: each waits for its own additions only.
SFACE_INLINE void dot4(const float* const x[4], const float* const w[4], int d, float out[4]) {
  F32 sum[4] = {}, more[4] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= d; k += 2 * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      sum[i] += load(x[i] + k) * load(w[i] + k);
      more[i] += load(x[i] + k + kLanes) * load(w[i] + k + kLanes);
    }
  if (k + kLanes <= d) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] += load(x[i] + k) * load(w[i] + k);
    k += kLanes;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sum[i] += more[i];
  sum_lanes4(sum, out);
  if (__builtin_expect(k < d, 0)) add_rest(x, w, k, d, out);
}

void axpy(float scale, const float* x, float* y, int d) {
  int k = 0;
  for (; k + kLanes <= d; k += kLanes) store(y + k, load(y + k) + scale * load(x + k));
  for (; k < d; ++k) y[k] += scale * x[k];
}

template <int kRows>
inline void add_rows(const float* scale, const float* const* x, bool first, float* y, int padded_d) {
  for (int64_t k = 0; k < padded_d; k += kLanes) {
    F32 sum = first ? F32{} : load(y + k);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) sum += scale[i] * load(x[i] + k);
    store(y + k, sum);
  }
}

void add_rows(int count, const float* scale, const float* const* x, bool first, float* y, int padded_d) {
  const auto add = count == 1 ? add_rows<1> : count == 2 ? add_rows<2> : count == 3 ? add_rows<3> : add_rows<4>;
  add(scale, x, first, y, padded_d);
}

void combine(float scale, const float* raw, float along, const float* w, float* out, int d) {
  int k = 0;
  if (can_stream(out))
    for (; k + kLanes <= d; k += kLanes) stream(out + k, scale * load(raw + k) + along * load(w + k));
  for (; k < d; ++k) out[k] = scale * raw[k] + along * w[k];
}

void zero(float* out, int d) {
  int k = 0;
  if (can_stream(out))
    for (; k + kLanes <= d; k += kLanes) stream(out + k, F32{});
  for (; k < d; ++k) out[k] = 0;
}

void finish_stores() { finish_streams(); }

void intra(const Hyper& hyper, float cosine, float* p) {
  const F32 theta = arccos(broadcast(cosine));
  *p = sigmoid_of_angle(theta, -hyper.k_intra * kLog2E, hyper.a)[0];
}

constexpr int kRowsAtOnce = 4;

// Length of a row from its fp32 sum of squares, again in double where that leaves the range that keeps its accuracy.
inline double row_norm(const float* row, int d, float square) {
  if (square > 1e-30f && square < 1e37f) return __builtin_sqrt(static_cast<double>(square));
  double sum = 0;
  for (int k = 0; k < d; ++k) sum += static_cast<double>(row[k]) * row[k];
  return __builtin_sqrt(sum);
}

typedef int16_t Int16 __attribute__((may_alias));  // half of an int32 word of fixed point

// row·scale rounded to int16, `padded_d` of them.
inline void to_fixed_point(const float* row, int d, int padded_d, float scale, Int16* out) {
  constexpr float kRound = 12582912.0f;  // leaves round(v) in the low bits, two's complement
  int k = 0;
  for (; k + kLanes <= d; k += kLanes)
    *reinterpret_cast<I16*>(out + k) = __builtin_convertvector(I32(load(row + k) * scale + kRound), I16);
  for (; k < d; ++k) out[k] = static_cast<Int16>(I32(broadcast(row[k] * scale) + kRound)[0]);
  for (; k < padded_d; ++k) out[k] = 0;
}

// Σ x² of each row, and the largest |x| where it is wanted. Together: the additions of one row wait for each other.
template <bool kLargest>
inline void sums_of_squares(const float* const rows[kRowsAtOnce], int d, float out[kRowsAtOnce],
                            float largest[kRowsAtOnce]) {
  F32 sum[kRowsAtOnce] = {}, more[kRowsAtOnce] = {}, top[kRowsAtOnce] = {};
  int k = 0;
  for (; k + 2 * kLanes <= d; k += 2 * kLanes)
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const F32 first = load(rows[r] + k), second = load(rows[r] + k + kLanes);
      sum[r] += first * first;
      more[r] += second * second;
      if constexpr (kLargest) top[r] = larger(top[r], larger(absolute(first), absolute(second)));
    }
  for (int r = 0; r < kRowsAtOnce; ++r) out[r] = sum_lanes(sum[r] + more[r]);
  if constexpr (kLargest)
    for (int r = 0; r < kRowsAtOnce; ++r) largest[r] = largest_lane(top[r]);
  for (; k < d; ++k)
    for (int r = 0; r < kRowsAtOnce; ++r) {
      out[r] += rows[r][k] * rows[r][k];
      if constexpr (kLargest) largest[r] = __builtin_fmaxf(largest[r], __builtin_fabsf(rows[r][k]));
    }
}

// sum += Σ_r scale[r]·rows[r]
inline void add_scaled(const float* const rows[kRowsAtOnce], const float scale[kRowsAtOnce], int d, float* sum) {
  int k = 0;
  for (; k + kLanes <= d; k += kLanes) {
    F32 total = load(sum + k);
    for (int r = 0; r < kRowsAtOnce; ++r) total += scale[r] * load(rows[r] + k);
    store(sum + k, total);
  }
  for (; k < d; ++k)
    for (int r = 0; r < kRowsAtOnce; ++r) sum[k] += scale[r] * rows[r][k];
}

void pack_panel(float* rows, int count, int d, int padded_d, int32_t* fixed_point, double* norms) {
  for (int i = 0; i < count; ++i) {
    float* row = rows + static_cast<int64_t>(i) * padded_d;
    const double norm = row_norm(row, d, dot(row, row, d));
    norms[i] = norm;
    const double inv = is_finite(norm) ? 1.0 / (norm < kNormEps ? kNormEps : norm) : 0.0;
    for (int k = 0; k < d; ++k) row[k] = inv > 0 ? static_cast<float>(row[k] * inv) : 0.0f;
    for (int k = d; k < padded_d; ++k) row[k] = 0;
  }
  if (fixed_point) {
    constexpr int kAtOnce = kFeaturePad / 2;  // the lines that these features are written to stay in the L1 cache
    std::memset(fixed_point, 0, sizeof(int32_t) * (padded_d / 2) * kPanel);
    for (int start = 0; start < padded_d / 2; start += kAtOnce)
      for (int i = 0; i < count; ++i) {
        int32_t words[kAtOnce];
        to_fixed_point(rows + static_cast<int64_t>(i) * padded_d + 2 * start, 2 * kAtOnce, 2 * kAtOnce, kScale,
                       reinterpret_cast<Int16*>(words));
        for (int k = 0; k < kAtOnce; ++k) fixed_point[(start + k) * kPanel + i] = words[k];
      }
  }
}
