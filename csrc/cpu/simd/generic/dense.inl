// fp32 matrix products on blocks that stay in cache, for blocks of classes dense in active pairs.
// Included per instruction set, after vectors.inl.

// c[r][0 … kPanel) (+)= Σ_k a[r·a_row + k·a_k] · b[k·kPanel …] for kRows rows.
template <int kRows>
inline void gemm_rows(const float* a, int64_t a_row, int64_t a_k, const float* b, int k, float* c, int64_t c_row,
                      bool accumulate) {
  F32 sum[kRows][kPanelVectors] = {};
  for (int i = 0; i < k; ++i) {
    F32 column[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) column[v] = load(b + static_cast<int64_t>(i) * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F32 element = broadcast(a[r * a_row + i * a_k]);
      for (int v = 0; v < kPanelVectors; ++v) sum[r][v] += element * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) {
      float* out = c + r * c_row + v * kLanes;
      store(out, accumulate ? load(out) + sum[r][v] : sum[r][v]);
    }
}

template <int kRows>
inline void gemm_tail(int rows, const float* a, int64_t a_row, int64_t a_k, const float* b, int k, float* c,
                      int64_t c_row, bool accumulate) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return gemm_rows<kRows>(a, a_row, a_k, b, k, c, c_row, accumulate);
    gemm_tail<kRows - 1>(rows, a, a_row, a_k, b, k, c, c_row, accumulate);
  }
}

// All rows against one panel of b.
inline void gemm_panel(int rows, const float* a, int64_t a_row, int64_t a_k, const float* b, int k, float* c,
                       int64_t c_row, bool accumulate) {
  int r = 0;
  for (; r + kStripRows <= rows; r += kStripRows)
    gemm_rows<kStripRows>(a + r * a_row, a_row, a_k, b, k, c + r * c_row, c_row, accumulate);
  if (r < rows) gemm_tail<kStripRows - 1>(rows - r, a + r * a_row, a_row, a_k, b, k, c + r * c_row, c_row, accumulate);
}

void add_dense(const float* tile, int tile_stride, int rows, const float* columns, int count, int padded_d,
               float* raw) {
  for (int k = 0; k < padded_d; k += kPanel)
    gemm_panel(rows, tile, tile_stride, 1, columns + static_cast<int64_t>(k) * count, count, raw + k, padded_d, true);
}

void pack_features(const float* rows, int count, int padded_d, float* columns) {
  for (int k = 0; k < padded_d; k += kPanel)
    for (int i = 0; i < count; ++i, columns += kPanel)
      std::memcpy(columns, rows + static_cast<int64_t>(i) * padded_d + k, sizeof(float) * kPanel);
}

// (1) for a block: tile[row][panels·kPanel]. Features in parts: a part of a panel stays in the L1 cache for all rows,
// and shorter sums round less.
inline void cosine_tile(const Group& group, const Block& block, Workspace& work) {
  constexpr int kPart = 128;
  const int d = group.d;
  const int stride = group.panels * kPanel;
  for (int panel = 0; panel < group.panels; ++panel)
    for (int k = 0; k < d; k += kPart)
      gemm_panel(block.count, block.w + k, block.row_stride, 1,
                 group.columns + (static_cast<int64_t>(panel) * d + k) * kPanel, d - k < kPart ? d - k : kPart,
                 work.tile.data() + panel * kPanel, stride, k > 0);
}

// Products in the tile become sigmoids where the entry is kept and 0 elsewhere; sums, where wanted, on the way.
// Lanes that do not take part and own classes become 0 and count nowhere.
template <bool kSums>
inline int64_t coefficient_tile(const Rules& rules, const Group& group, const Block& block, Workspace& work,
                                RowSums* sums) {
  constexpr int kAtOnce = 2 * kPanelVectors;  // classes
  constexpr float kNoClass = -4.0f;           // no cosine: marks own classes and rows past the last
  const int stride = group.panels * kPanel, padded_rows = (block.count + kAtOnce - 1) / kAtOnce * kAtOnce;
  float* tile = work.tile.data();
  // a row that is not finite reads as -1 here; the drivers turn what it touches into NaN
  for (int row = 0; row < block.count; ++row) {
    const F32 inv = broadcast(work.inv_norm[row]);
    for (int i = 0; i < stride; i += kLanes)
      store(tile + row * stride + i, clamp(load(tile + row * stride + i) * inv, -1.0f, 1.0f));
  }
  for (int i = block.count * stride; i < padded_rows * stride; ++i) tile[i] = kNoClass;
  for (int i = 0; i < block.own_count; ++i) tile[block.own[i].row * stride + block.own[i].sample] = kNoClass;

  int64_t active = 0;
  for (int i = 0; i < stride; i += kLanes) {
    const uint32_t takes_part = group.participates[i / kPanel] >> (i % kPanel);
    I32 lane_on;
    for (int lane = 0; lane < kLanes; ++lane) lane_on[lane] = -static_cast<int32_t>(takes_part >> lane & 1);
    F32 inter{}, dropped{}, hardest = broadcast(-2.0f);
    I32 hardest_row{};
    for (int row = 0; row < padded_rows; row += kAtOnce) {
      const auto c = each<kAtOnce>([&](int r) { return load(tile + (row + r) * stride + i); });
      const auto weight = sigmoid_of_angle(arccos(clamp(c, -1.0f, 1.0f)), rules.slope_log2, rules.hyper.b);
#pragma GCC unroll 8
      for (int r = 0; r < kAtOnce; ++r) {
        const I32 counted = lane_on & I32(c.v[r] > kNoClass + 1.0f);
        const I32 kept = counted & I32(weight.v[r] >= rules.keep_above);
        store(tile + (row + r) * stride + i, select(kept, weight.v[r], F32{}));
        if constexpr (kSums) {
          active += __builtin_popcount(bits(kept));
          inter += select(counted, weight.v[r] * c.v[r], F32{});
          dropped += select(counted & ~kept, weight.v[r], F32{});
          const F32 other = select(counted, c.v[r], broadcast(-2.0f));
          hardest_row = select(I32(other > hardest), broadcast_int(row + r), hardest_row);
          hardest = select(I32(other > hardest), other, hardest);
        }
      }
    }
    if constexpr (kSums) {
      for (int lane = 0; lane < kLanes && i + lane < group.count; ++lane) {
        sums->inter[i + lane] += inter[lane];
        sums->dropped[i + lane] += dropped[lane];
        if (hardest[lane] > sums->hardest[i + lane]) {
          sums->hardest[i + lane] = hardest[lane];
          sums->hardest_class[i + lane] = static_cast<int32_t>(block.first) + hardest_row[lane];
        }
      }
    }
  }
  return active;
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

// Moves what add_unit_rows summed to the rows of the task.
void flush_dense_grad(const Group& group, RowSums& sums, Workspace& work) {
  if (!work.has_dense_grad) return;
  const int padded_d = group.padded_d;
  work.has_dense_grad = false;
  for (int i = 0; i < group.count; ++i) {
    float* grad = sums.grad + static_cast<int64_t>(i) * padded_d;
    if (!sums.touched[i]) std::memset(grad, 0, sizeof(float) * padded_d);
    sums.touched[i] = 1;
    for (int k = 0; k < padded_d; k += kPanel)
      axpy(1.0f, work.dense_grad.data.get() + static_cast<int64_t>(k) * kGroupSamples + i * kPanel, grad + k, kPanel);
  }
}

void recompute_tile(const Rules& rules, const Group& group, const Block& block, Workspace& work) {
  cosine_tile(group, block, work);
  coefficient_tile<false>(rules, group, block, work, nullptr);
}
