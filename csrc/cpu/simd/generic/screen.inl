// The streamed pass over a block of classes: screen every pair in fixed point, rescore the candidates in fp32.
//
// Reads each row of w from memory once (the next block is prefetched meanwhile); cosines exist only in registers.
// Included per instruction set, after dense.inl.

// Screened products of kStripRows classes with one panel of samples, exact integers.
struct Products {
  I32 sum[kStripRows][kPanelVectors];
};

// Hides the value's origin, so that the optimiser does not precompute pointers from it ahead of a loop.
template <typename T>
SFACE_INLINE void keep_in_register(T& value) {
  asm("" : "+r"(value));
}

// `depth` words of a few features each, multiplied by Screen::dot, the sums from `start` on. Each word is a step, of
// two cache lines at most.
template <typename Screen>
SFACE_INLINE void multiply(const int32_t* w_words, const int32_t* x_words, const I32 start[kPanelVectors], int depth,
                           Ahead& ahead, Products& out) {
  const char* next = ahead.from + ahead.at;  // one place: nothing was fetched before, or kStreams is 1
  // A pointer per row would leave no register for the prefetch, and a spilled one costs 8 % of the time: every fourth
  // row has a pointer, and addressing adds the strides of the three after it.
  static_assert(kStripRows <= 12);
  int64_t stride = depth, three = 3 * stride;
  keep_in_register(stride);
  keep_in_register(three);
  const int32_t *first = w_words, *second = first + 4 * stride, *third = kStripRows > 8 ? second + 4 * stride : second;
  I32 sum[kStripRows][kPanelVectors];
  for (int r = 0; r < kStripRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) sum[r][v] = start[v];
  for (const int32_t* const end = x_words + int64_t{depth} * kPanel; x_words != end; x_words += kPanel) {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + 64, 0, 2);
    next += ahead.bytes;
    I32 x[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) x[v] = load_int(x_words + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kStripRows; ++r) {
      const int64_t offset = r % 4 == 0 ? 0 : r % 4 == 1 ? stride : r % 4 == 2 ? 2 * stride : three;
      const I32 w = broadcast_int((r < 4 ? first : r < 8 ? second : third)[offset]);
      for (int v = 0; v < kPanelVectors; ++v) sum[r][v] = Screen::dot(sum[r][v], x[v], w);
    }
    keep_in_register(++first);
    keep_in_register(++second);
    if (kStripRows > 8) keep_in_register(++third);
  }
  ahead.at = next - ahead.from;
#pragma GCC unroll 16
  for (int r = 0; r < kStripRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) out.sum[r][v] = sum[r][v];
}

// An own class, or a row past the last class, reads as the largest product: a candidate, so that it counts in no sum.
// The rescoring skips both.
inline void mask_absent_rows(int rows, Products& products) {
  for (int r = rows; r < kStripRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) products.sum[r][v] = broadcast_int(INT32_MAX);
}

inline void mask_own_classes(const Block& block, int strip, int panel, Products& products) {
  int32_t values[kStripRows][kPanel];
  for (int r = 0; r < kStripRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) store_int(values[r] + v * kLanes, products.sum[r][v]);
  for (int i = 0; i < block.own_count; ++i) {
    const int row = block.own[i].row - strip * kStripRows, sample = block.own[i].sample - panel * kPanel;
    if (row >= 0 && row < kStripRows && sample >= 0 && sample < kPanel) values[row][sample] = INT32_MAX;
  }
  for (int r = 0; r < kStripRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) products.sum[r][v] = load_int(values[r] + v * kLanes);
}

// Sums the loss of every pair of a tile below the threshold, and marks the others, the candidates. With kTile the
// coefficients of those below go to Workspace::tile, and 0 for the others. Two classes at a time.
template <bool kCheap, bool kTile>
SFACE_INLINE void sum_tile(const Rules& rules, const Block& block, int strip, int panel, int panels,
                           const Products& products, RowSums& sums, Workspace& work) {
  constexpr float kToCosine = 1.0f / (kScale * kScale);
  constexpr int kVectors = 2 * kPanelVectors;  // of two classes
  static_assert(kStripRows % 2 == 0);
  const int first_row = strip * kStripRows, at = panel * kPanel;
  const I32 below_candidates = broadcast_int(rules.candidate_min - 1);
  const BelowSeries series(rules.slope_log2, rules.hyper.b);
  F32 loss[kPanelVectors], weights[kPanelVectors];
  I32 best[kPanelVectors], best_class[kPanelVectors];
  for (int v = 0; v < kPanelVectors; ++v) {
    loss[v] = load(work.below.data() + at + v * kLanes);
    weights[v] = load(work.below_weight.data() + at + v * kLanes);
    best[v] = load_int(sums.best + at + v * kLanes);
    best_class[v] = load_int(sums.best_class + at + v * kLanes);
  }
  for (int row = 0; row < kStripRows; row += 2) {
    const I32* product = products.sum[row];  // [2][kPanelVectors]
    const auto c = each<kVectors>([&](int i) { return __builtin_convertvector(product[i], F32) * kToCosine; });
    Pack<kVectors> weight;
    if constexpr (kCheap) {
      weight = inter_weight_below(c, series);
    } else {
      weight = sigmoid_of_angle(arccos(clamp(c, -1.0f, 1.0f)), rules.slope_log2, rules.hyper.b);
    }
    uint32_t found[2] = {};
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const int v = i % kPanelVectors, r = i / kPanelVectors;
      const I32 candidate = I32(product[i] > below_candidates);
      const F32 counted = select(candidate, F32{}, weight.v[i]);
      if constexpr (kTile)
        store(work.tile.data() + ((first_row + row + r) * panels * kPanel + at + v * kLanes), counted);
      loss[v] += counted * c.v[i];
      weights[v] += counted;
      const I32 rest = select(candidate, broadcast_int(INT32_MIN), product[i]);
      const I32 cls = broadcast_int(static_cast<int32_t>(block.first) + first_row + row + r);
      best_class[v] = select(I32(rest > best[v]), cls, best_class[v]);
      best[v] = select(I32(rest > best[v]), rest, best[v]);
      found[r] |= bits(candidate) << (v * kLanes);
    }
    work.candidates[(first_row + row) * panels + panel] = found[0];
    work.candidates[(first_row + row + 1) * panels + panel] = found[1];
  }
  for (int v = 0; v < kPanelVectors; ++v) {
    store(work.below.data() + at + v * kLanes, loss[v]);
    store(work.below_weight.data() + at + v * kLanes, weights[v]);
    store_int(sums.best + at + v * kLanes, best[v]);
    store_int(sums.best_class + at + v * kLanes, best_class[v]);
  }
}

// The screen in int16, on every instruction set.
template <bool kCheap, bool kTile>
class Int16Screen {
 public:
  Int16Screen(const Rules& rules, const Group& group, Workspace& work)
      : rules_(rules), group_(group), work_(work), depth_(group.padded_d / 2) {}

  int64_t steps() const { return depth_; }  // of a tile
  static SFACE_INLINE I32 dot(I32 sum, I32 x, I32 w) { return dot_int16(sum, x, w); }
  void begin(const Block&) const {}
  void end(const Block&, RowSums&) const {}

  Products& multiply_tile(int strip, int panel, Ahead& ahead) {
    const I32 start[kPanelVectors] = {};
    multiply<Int16Screen>(work_.fixed_point.data() + static_cast<int64_t>(strip) * kStripRows * depth_,
                          group_.fixed_point + static_cast<int64_t>(panel) * depth_ * kPanel, start, depth_, ahead,
                          products_);
    return products_;
  }

  void sum(const Block& block, int strip, int panel, bool, const Products& products, RowSums& sums, Ahead&) {
    sum_tile<kCheap, kTile>(rules_, block, strip, panel, group_.panels, products, sums, work_);
  }

 private:
  const Rules& rules_;
  const Group& group_;
  Workspace& work_;
  int depth_;  // words of two features
  Products products_;
};

template <typename Screen>
inline void screen_block(Screen&& screen, const Group& group, const Block& block, Ahead& ahead, RowSums& sums,
                         Workspace& work) {
  const int strips = (block.count + kStripRows - 1) / kStripRows;
  ahead.plan(ahead.left, static_cast<int64_t>(strips) * group.panels * screen.steps());
  for (int i = 0; i < block.own_count; ++i)
    work.own_tiles[block.own[i].row / kStripRows * group.panels + block.own[i].sample / kPanel] = 1;
  screen.begin(block);
  for (int panel = 0; panel < group.panels; ++panel)
    for (int strip = 0; strip < strips; ++strip) {
      Products& products = screen.multiply_tile(strip, panel, ahead);
      uint8_t& own = work.own_tiles[strip * group.panels + panel];
      bool masked = false;
      if (__builtin_expect(own, 0)) {
        mask_own_classes(block, strip, panel, products);
        own = 0;
        masked = true;
      }
      const int rows = block.count - strip * kStripRows;
      if (__builtin_expect(rows < kStripRows, 0)) {
        mask_absent_rows(rows, products);
        masked = true;
      }
      screen.sum(block, strip, panel, masked, products, sums, ahead);
    }
  screen.end(block, sums);
}

// The candidates of a block but its own classes, class by class, as row << 16 | sample in Workspace::pairs, and how
// many; −1 where there are more than `most`.
//
// Nothing branches on a bit, or on whether a word has any: where 5 % of the pairs are candidates, a core would guess
// wrong at every second word.
constexpr int kPairsAtOnce = 4;
inline int list_candidates(const Group& group, const Block& block, int64_t most, Workspace& work) {
  for (int i = 0; i < block.own_count; ++i)
    work.candidates[block.own[i].row * group.panels + block.own[i].sample / kPanel] &=
        ~(1u << block.own[i].sample % kPanel);
  int32_t first[kBlockClasses * (kGroupSamples / kPanel)];  // pair of the lowest bit of each word that has any
  int words = 0;
  for (int row = 0; row < block.count; ++row)
    if (is_finite(work.inv_norm[row]))  // else the drivers turn every loss into NaN
      for (int panel = 0; panel < group.panels; ++panel) {
        uint32_t& found = work.candidates[row * group.panels + panel];
        found &= group.participates[panel];
        first[words] = row << 16 | panel * kPanel;
        words += found != 0;
      }
  int32_t* const pairs = work.pairs.data.get();
  int count = 0;
  for (int word = 0; word < words; ++word) {
    uint32_t found = work.candidates[(first[word] >> 16) * group.panels + (first[word] & 0xffff) / kPanel];
    const int end = count + __builtin_popcount(found);
    if (end > most) return -1;
    do {
#pragma GCC unroll 4
      for (int i = 0; i < kPairsAtOnce; ++i, found &= found - 1)
        pairs[count + i] = first[word] + __builtin_ctz(found | 1u << 31);  // past the last bit: overwritten later
      count += kPairsAtOnce;
    } while (count < end);
    count = end;
  }
  for (int i = 0; count > 0 && i < kPairsAtOnce; ++i)
    pairs[count + i] = pairs[count - 1];  // they are rescored together
  return count;
}

// Some candidates of a block.
struct Candidates {
  static constexpr int kMost = 64;  // their rows of w and x stay in the L1 and L2 caches
  int count;
  const int32_t* pairs;
  float cosine[kMost], weight[kMost];
  static_assert(kMost % kPairsAtOnce == 0 && kMost % kLanes == 0);

  SFACE_INLINE int row(int n) const { return pairs[n] >> 16; }
  SFACE_INLINE int sample(int n) const { return pairs[n] & 0xffff; }
};

// Cosines in fp32 from the original rows, then (4). Many at a time: most classes have a candidate or none.
inline void rescore(const Rules& rules, const Group& group, const Block& block, const Workspace& work,
                    Candidates& list) {
  float inv_norm[Candidates::kMost];
  int n = 0;
  for (; n < list.count; n += kPairsAtOnce) {
    const float *x[kPairsAtOnce], *w[kPairsAtOnce];
    for (int i = 0; i < kPairsAtOnce; ++i) {
      const int row = list.row(n + i);
      x[i] = group.rows + static_cast<int64_t>(list.sample(n + i)) * group.padded_d;
      w[i] = block.w + row * block.row_stride;
      inv_norm[n + i] = work.inv_norm[row];
    }
    dot4(x, w, group.d, list.cosine + n);
  }
  for (; n % kLanes; ++n) list.cosine[n] = inv_norm[n] = 0;
  for (n = 0; n < list.count; n += kLanes) {
    const F32 cosine = clamp(load(list.cosine + n) * load(inv_norm + n), -1.0f, 1.0f);
    store(list.cosine + n, cosine);
    store(list.weight + n, sigmoid_of_angle(arccos(cosine), rules.slope_log2, rules.hyper.b));
  }
}

// Adds some rescored candidates to the sums, the active ones to Σ g ŵ and to the list in the arena. False where that
// had no room.
inline bool take(const Rules& rules, const Group& group, const Block& block, const Candidates& list, Task& task,
                 const Workspace& work) {
  RowSums& sums = task.sums;
  int active[Candidates::kMost], actives = 0;
  for (int n = 0; n < list.count; ++n) {
    const int i = list.sample(n);
    const float cosine = list.cosine[n], weight = list.weight[n];
    const bool kept = weight >= rules.keep_above;
    sums.inter[i] += static_cast<double>(weight) * cosine;
    sums.dropped[i] += kept ? 0.0f : weight;
    if (cosine > sums.hardest[i]) {
      sums.hardest[i] = cosine;
      sums.hardest_class[i] = static_cast<int32_t>(block.first) + list.row(n);
    }
    active[actives] = n;
    actives += kept;
  }
  task.tally.active += actives;
  if (sums.grad)
    for (int k = 0; k < actives; ++k) {
      const int n = active[k], row = list.row(n), i = list.sample(n);
      float* grad = sums.grad + static_cast<int64_t>(i) * group.padded_d;
      if (!sums.touched[i]) std::memset(grad, 0, sizeof(float) * group.padded_d);
      sums.touched[i] = 1;
      axpy(list.weight[n] * work.inv_norm[row], block.w + row * block.row_stride, grad, group.d);
    }
  Arena& arena = task.arena;
  if (!arena.wanted) return true;
  if (arena.used + 2 * actives > arena.capacity) return false;
  for (int k = 0; k < actives; ++k, arena.used += 2) {
    arena.words[arena.used] = list.pairs[active[k]];
    std::memcpy(arena.words + arena.used + 1, &list.weight[active[k]], sizeof(float));
  }
  return true;
}

// What list_candidates found. False where the arena was too small for the active ones. By itself: within forward_block
// its loops would not have the registers that they need.
__attribute__((noinline)) bool rescore_block(const Rules& rules, const Group& group, const Block& block, int count,
                                             Task& task, Workspace& work) {
  bool listed = true;
  Candidates list;
  for (int first = 0; first < count; first += Candidates::kMost) {
    list.count = count - first < Candidates::kMost ? count - first : Candidates::kMost;
    list.pairs = work.pairs.data.get() + first;
    rescore(rules, group, block, work, list);
    listed &= take(rules, group, block, list, task, work);
  }
  return listed;
}
