// Exact calls in int16: what the screen leaves as far pairs, whose coefficients are so small that three digits of them
// are enough, goes through two more products of integers (docs/math.md, 3). vpdpwssd multiplies twice as many int16
// as a fused multiply-add does floats. Included after screen.inl.
//
// Both products have pairs of terms side by side in a word, and sums that stay in int32: coefficients are scaled so
// that their sum is 2¹⁵ at most, and the others' entries are at most kScale.

constexpr float kFarSum = 32767.0f;
// A unit of a coefficient's word times one of a unit row's is this times the coefficients' sum.
constexpr float kFarUnit = 1 / (kFarSum * kScale);
constexpr int kFarPairs = kBlockClasses / 2;  // pairs of classes in a block
// A coefficient in the arena: of a float below 2 the bits from here on are 16, 9 of them after the point.
constexpr int kFarShift = 14;
static_assert(kPanel == 2 * kLanes && kPanel == kFarPanel);

// Operands of Σ g ŵ, in Workspace::parts.
struct FarMemory {
  int32_t* rows;          // ŵ [padded D / kPanel][pairs of classes][kPanel]
  int32_t* coefficients;  // [pairs of classes][group]
  FarMemory(Workspace& work, int padded_d)
      : rows(reinterpret_cast<int32_t*>(work.parts.data.get())), coefficients(rows + int64_t{kFarPairs} * padded_d) {}
};

// Two numbers of int16 in each word.
SFACE_INLINE I32 words_of(F32 low, F32 high) {
  const __m512i first = _mm512_cvtps_epi32(__m512(low)), second = _mm512_cvtps_epi32(__m512(high));
  return I32(_mm512_mask_blend_epi16(0xaaaaaaaa, first, _mm512_slli_epi32(second, 16)));
}

// Words of 32 entries of two rows of int16.
SFACE_INLINE void interleave(const void* low, const void* high, int32_t* out) {
  const __m512i first = _mm512_loadu_si512(low), second = _mm512_loadu_si512(high);
  const __m512i a = _mm512_unpacklo_epi16(first, second), b = _mm512_unpackhi_epi16(first, second);
  const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, lower, b));
  _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi64(a, upper, b));
}

// Two terms in a word, whose products have one sum.
struct FarTerms {
  using Word = int32_t;
  using Words = I32;
  static SFACE_INLINE I32 load_words(const int32_t* p) { return load_int(p); }
  static SFACE_INLINE I32 spread(int32_t word) { return broadcast_int(word); }
  static SFACE_INLINE I32 add(I32 sum, I32 column, I32 words) { return dot_int16(sum, column, words); }
};

// c[r][0 … kPanel) += the product of coefficients, which add up to sums[r], and unit rows.
inline void add_far_panel(int rows, const int32_t* a, int64_t a_row, int64_t a_k, const int32_t* b, int k,
                          const float* sums, float* c, int64_t c_row) {
  gemm_panel<FarTerms>(
      rows, a, a_row, a_k, b, k, [=](int r, int v, I32 sum) __attribute__((always_inline)) {
        float* const out = c + r * c_row + v * kLanes;
        store(out, load(out) + sums[r] * (__builtin_convertvector(sum, F32) * kFarUnit));
      });
}

// Σ_r tile[r][i] ŵ_r over the far pairs of a block, whose coefficients add up to work.below_weight: to work.dense_grad,
// as add_unit_rows.
__attribute__((noinline)) void add_far_unit_rows(const Group& group, const Block& block, Workspace& work) {
  constexpr float kSmallest = 0x1p-90f;  // what is far below it is nothing next to a coefficient of the own class
  const int padded_d = group.padded_d, stride = group.panels * kPanel, pairs = (block.count + 1) / 2;
  if (!work.has_dense_grad) std::memset(work.dense_grad.data.get(), 0, sizeof(float) * padded_d * kGroupSamples);
  work.has_dense_grad = true;
  const FarMemory memory(work, padded_d);
  alignas(64) float sums[kGroupSamples];
  for (int i = 0; i < stride; i += kLanes) {
    const F32 sum = at_least(load(work.below_weight.data() + i), kSmallest), scale = kFarSum / sum;
    store(sums + i, sum);
    for (int p = 0; p < pairs; ++p) {
      const float* const g = work.tile.data() + 2 * p * stride + i;
      store_int(memory.coefficients + p * stride + i, words_of(load(g) * scale, load(g + stride) * scale));
    }
  }
  const int32_t* const rows = work.fixed_point.data();
  int32_t* out = memory.rows;
  for (int k = 0; k < padded_d; k += kPanel, out += pairs * kPanel) {
    for (int p = 0; p < pairs; ++p) {
      const int32_t* const row = rows + (int64_t{2} * p * padded_d + k) / 2;
      interleave(row, row + padded_d / 2, out + p * kPanel);
    }
    add_far_panel(group.count, memory.coefficients, 1, stride, out, pairs, sums,
                  work.dense_grad.data.get() + int64_t{k} * kGroupSamples, kPanel);
  }
}

// The tile's far coefficients in the arena, which has room for them.
inline void store_far(const Group& group, const Block& block, const Workspace& work, Arena& arena) {
  const int stride = group.panels * kPanel, words = far_words(group.count);
  const __m512i half = _mm512_set1_epi32(1 << (kFarShift - 1));
  for (int row = 0; row < block.count; ++row, arena.used += words)
    for (int panel = 0; panel < group.panels; ++panel) {
      const float* const g = work.tile.data() + row * stride + panel * kPanel;
      const __m512i low = _mm512_add_epi32(_mm512_loadu_si512(g), half);
      const __m512i high = _mm512_add_epi32(_mm512_loadu_si512(g + kLanes), half);
      const __m512i word = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, kFarShift),
                                                   _mm512_slli_epi32(high, 16 - kFarShift));
      const int left = words - panel * kLanes;
      _mm512_mask_storeu_epi32(arena.words + arena.used + panel * kLanes,
                               static_cast<__mmask16>(left < kLanes ? (1u << left) - 1 : 0xffffu), word);
    }
}

// x̂ of a group as [padded D / kPanel][pairs of samples][kPanel], the samples i and i + 16 of a panel in a word.
void pack_far(const float* rows, int count, int padded_d, int32_t* out) {
  const int pairs = far_words(count);
  for (int k = 0; k < padded_d; k += kPanel)
    for (int p = 0; p < pairs; ++p, out += kPanel) {
      Int16 fixed[2][kPanel] = {};
      for (int half = 0; half < 2; ++half)
        if (const int i = p / kLanes * kPanel + p % kLanes + half * kLanes; i < count)
          to_fixed_point(rows + int64_t{i} * padded_d + k, kPanel, kPanel, kScale, fixed[half]);
      interleave(fixed[0], fixed[1], out);
    }
}

// raw[rows][padded D] += (far coefficients of the arena times u[count]) · x̂ of the group, as pack_far left them.
void add_far(const int32_t* words, const float* u, const Block& block, const int32_t* samples, int count, int padded_d,
             float* raw, Workspace& work) {
  const int pairs = far_words(count);
  int32_t* const coefficients = FarMemory(work, padded_d).rows;  // [block][pairs]
  Ahead ahead(block);
  ahead.plan(ahead.left, padded_d / kPanel);
  float sums[kBlockClasses];
  for (int row = 0; row < block.count; ++row, words += pairs) {
    F32 scaled[kGroupSamples / kLanes], total{};
    int vectors = 0;
    for (int p = 0; p < pairs; p += kLanes) {
      const int low_left = pairs - p, first = 2 * p, left = count - first;
      const __mmask16 mask = static_cast<__mmask16>(low_left < kLanes ? (1u << low_left) - 1 : 0xffffu);
      const __m512i word = _mm512_maskz_loadu_epi32(mask, words + p);
      const __m512i mask_16 = _mm512_set1_epi32(0xffff << kFarShift);
      const F32 low = F32(_mm512_and_si512(_mm512_slli_epi32(word, kFarShift), mask_16));
      const F32 high = F32(_mm512_and_si512(_mm512_srli_epi32(word, 16 - kFarShift), mask_16));
      scaled[vectors] = low * load_first(u + first, left);
      scaled[vectors + 1] = high * load_first(u + first + kLanes, left - kLanes);
      total += absolute(scaled[vectors]) + absolute(scaled[vectors + 1]);
      vectors += 2;
    }
    const float sum = sum_lanes(total);
    sums[row] = sum;
    // in two steps where one factor would leave the range of fp32
    const float up = sum < 0x1p-60f ? 0x1p60f : 1.0f, scale = sum > 0 ? kFarSum / (sum * up) : 0.0f;
    for (int v = 0; v < vectors; v += 2)
      store_int(coefficients + int64_t{row} * kGroupSamples / 2 + v / 2 * kLanes,
                words_of(scaled[v] * up * scale, scaled[v + 1] * up * scale));
  }
  for (int k = 0; k < padded_d; k += kPanel) {
    ahead.step();
    add_far_panel(block.count, coefficients, kGroupSamples / 2, 1, samples + int64_t{k} * pairs, pairs, sums, raw + k,
                  padded_d);
  }
}

struct Far {
  static constexpr bool kThere = true;
  static constexpr int kSamples = 32;  // a group of fewer would mostly multiply panels' padding
  static constexpr auto pack = pack_far;
  static constexpr auto add = add_far;
  static constexpr auto add_unit_rows = add_far_unit_rows;
  static constexpr auto store = store_far;

  // Share of near pairs above which a block goes through products in fp32: what these cost more grows with D, what a
  // listed pair costs less so.
  static double near_share(int d) { return 0.09 * (1 - 80.0 / d); }
  static int64_t bytes(int64_t padded_d) {
    return static_cast<int64_t>(sizeof(int32_t)) * kFarPairs * (padded_d + kGroupSamples);
  }
};
