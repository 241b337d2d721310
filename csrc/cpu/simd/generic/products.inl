// Matrix products in fp32 on blocks that stay in cache, for blocks of classes dense in active pairs.
// Included per instruction set, after vectors.inl, where there is nothing faster.

// Share of candidates above which products beat rescoring pair by pair. Measured with AVX-512 at N=128, lists alone and
// products alone: at D=512 37 and 42 ms with 0.15 active, 52 and 42 with 0.25; at D=128 16 and 17, then 17 and 17.
constexpr double kDenseShare = 0.18;
constexpr int kColumnWords = kPanel;  // words of a panel in the samples' layouts, for each feature
int64_t parts_bytes(int64_t) { return 0; }
constexpr float kDenseGradScale = 1.0f;  // Workspace::dense_grad holds the sums times this

// What products are made of: numbers, each with its own sum.
struct Floats {
  using Word = float;
  using Words = F32;
  static SFACE_INLINE F32 load_words(const float* p) { return load(p); }
  static SFACE_INLINE F32 spread(float word) { return broadcast(word); }
  static SFACE_INLINE F32 add(F32 sum, F32 column, F32 words) { return sum + words * column; }
};

// finish(r, v, Σ_k a[r·a_row + k·a_k] · b[k·kPanel + v·kLanes …]) for kRows rows from `first` on, and each vector of a
// panel.
template <typename Terms, int kRows, typename Finish>
inline void gemm_rows(int first, const typename Terms::Word* a, int64_t a_row, int64_t a_k,
                      const typename Terms::Word* b, int k, const Finish& finish) {
  a += first * a_row;
  typename Terms::Words sum[kRows][kPanelVectors] = {};
  for (int i = 0; i < k; ++i) {
    typename Terms::Words column[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v)
      column[v] = Terms::load_words(b + static_cast<int64_t>(i) * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const typename Terms::Words words = Terms::spread(a[r * a_row + i * a_k]);
      for (int v = 0; v < kPanelVectors; ++v) sum[r][v] = Terms::add(sum[r][v], column[v], words);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) finish(first + r, v, sum[r][v]);
}

template <typename Terms, int kRows, typename Finish>
inline void gemm_tail(int rows, int first, const typename Terms::Word* a, int64_t a_row, int64_t a_k,
                      const typename Terms::Word* b, int k, const Finish& finish) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return gemm_rows<Terms, kRows>(first, a, a_row, a_k, b, k, finish);
    gemm_tail<Terms, kRows - 1>(rows, first, a, a_row, a_k, b, k, finish);
  }
}

// All rows against one panel of b.
template <typename Terms, typename Finish>
inline void gemm_panel(int rows, const typename Terms::Word* a, int64_t a_row, int64_t a_k,
                       const typename Terms::Word* b, int k, const Finish& finish) {
  int r = 0;
  for (; r + kStripRows <= rows; r += kStripRows) gemm_rows<Terms, kStripRows>(r, a, a_row, a_k, b, k, finish);
  if (r < rows) gemm_tail<Terms, kStripRows - 1>(rows - r, r, a, a_row, a_k, b, k, finish);
}

// c[r][0 … kPanel) (+)= the product. By itself: three callers' copies of all its loops took up to 5 % longer.
__attribute__((noinline)) void gemm_panel(int rows, const float* a, int64_t a_row, int64_t a_k, const float* b, int k,
                                          float* c, int64_t c_row, bool accumulate) {
  gemm_panel<Floats>(
      rows, a, a_row, a_k, b, k, [=](int r, int v, F32 sum) __attribute__((always_inline)) {
        float* const out = c + r * c_row + v * kLanes;
        store(out, accumulate ? load(out) + sum : sum);
      });
}

void add_dense(const Rules&, const float* tile, int tile_stride, const float* u, const Block& block,
               const float* columns, int count, int padded_d, float* raw, Workspace& work) {
  float* const scaled = work.scaled.data();  // [rows][count]
  for (int row = 0; row < block.count; ++row) {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes)
      store(scaled + row * count + i, load(tile + row * tile_stride + i) * load(u + i));
    for (; i < count; ++i) scaled[row * count + i] = tile[row * tile_stride + i] * u[i];
  }
  for (int k = 0; k < padded_d; k += kPanel)
    gemm_panel(block.count, scaled, count, 1, columns + static_cast<int64_t>(k) * count, count, raw + k, padded_d,
               true);
}

void pack_features(const float* rows, int count, int padded_d, float* columns) {
  for (int k = 0; k < padded_d; k += kPanel)
    for (int i = 0; i < count; ++i, columns += kPanel)
      std::memcpy(columns, rows + static_cast<int64_t>(i) * padded_d + k, sizeof(float) * kPanel);
}

// x̂ of a panel as [D][kPanel]
void pack_columns(const float* rows, int count, int d, int padded_d, float* columns) {
  constexpr int kAtOnce = kFeaturePad / 2;  // the lines that these features are written to stay in the L1 cache
  std::memset(columns, 0, sizeof(float) * d * kPanel);
  for (int start = 0; start < d; start += kAtOnce)
    for (int i = 0; i < count; ++i)
      for (int k = start; k < start + kAtOnce && k < d; ++k)
        columns[k * kPanel + i] = rows[static_cast<int64_t>(i) * padded_d + k];
}

// (1) for a block: tile[row][panels·kPanel]. Features in parts: a part of a panel stays in the L1 cache for all rows,
// and shorter sums round less.
template <bool>
inline void cosine_tile(const Rules&, const Group& group, const Block& block, Workspace& work, Ahead*) {
  constexpr int kPart = 128;
  const int d = group.d;
  const int stride = group.panels * kPanel;
  for (int panel = 0; panel < group.panels; ++panel)
    for (int k = 0; k < d; k += kPart)
      gemm_panel(block.count, block.w + k, block.row_stride, 1,
                 group.columns + (static_cast<int64_t>(panel) * group.padded_d + k) * kPanel,
                 d - k < kPart ? d - k : kPart, work.tile.data() + panel * kPanel, stride, k > 0);
  for (int row = 0; row < block.count; ++row) {
    float* const tile = work.tile.data() + row * stride;
    for (int i = 0; i < stride; i += kLanes) store(tile + i, load(tile + i) * work.inv_norm[row]);
  }
}

// Σ_r tile[r][i] ŵ_r added to work.dense_grad[padded D / kPanel][group][kPanel], where a panel's part is contiguous
inline void add_unit_rows(const Group& group, const Block& block, Workspace& work) {
  const int d = group.d, padded_d = group.padded_d, stride = group.panels * kPanel;
  if (!work.has_dense_grad) std::memset(work.dense_grad.data.get(), 0, sizeof(float) * padded_d * kGroupSamples);
  work.has_dense_grad = true;
  float* packed = work.packed.data();  // [block][kPanel]
  for (int k = 0; k < padded_d; k += kPanel) {
    for (int row = 0; row < block.count; ++row) {
      const float* w = block.w + row * block.row_stride;
      float* out = packed + row * kPanel;
      const float inv = work.inv_norm[row];
      if (k + kPanel <= d) {
        for (int v = 0; v < kPanel; v += kLanes) store(out + v, load(w + k + v) * inv);
      } else {
        for (int v = 0; v < kPanel; ++v) out[v] = k + v < d ? w[k + v] * inv : 0.0f;
      }
    }
    gemm_panel(group.count, work.tile.data(), 1, stride, packed, block.count,
               work.dense_grad.data.get() + static_cast<int64_t>(k) * kGroupSamples, kPanel, true);
  }
}

// What add_unit_rows has put off.
inline void finish_unit_rows(const Group&, Workspace&) {}
