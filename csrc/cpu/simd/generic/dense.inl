// Blocks of classes dense in active pairs: every pair by matrix products, its coefficient in a tile that stays in
// cache. Included per instruction set, after the products.

// Cosines in the tile become sigmoids where the entry is kept and 0 elsewhere, with the sums on the way.
// Lanes that do not take part and own classes become 0 and count nowhere.
inline int64_t coefficient_tile(const Rules& rules, const Group& group, const Block& block, Workspace& work,
                                RowSums& sums) {
  constexpr int kAtOnce = 2 * kPanelVectors;  // classes
  constexpr float kNoClass = -4.0f;           // no cosine: marks own classes and rows past the last
  const int stride = group.panels * kPanel, padded_rows = (block.count + kAtOnce - 1) / kAtOnce * kAtOnce;
  float* tile = work.tile.data();
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
      const auto found = each<kAtOnce>([&](int r) { return load(tile + (row + r) * stride + i); });
      const auto c = clamp(found, -1.0f, 1.0f);
      const auto weight = sigmoid_of_angle(arccos(c), rules.slope_log2, rules.hyper.b);
#pragma GCC unroll 8
      for (int r = 0; r < kAtOnce; ++r) {
        // not where a row is not finite either: the drivers turn what it touches into NaN
        const I32 counted = lane_on & I32(found.v[r] > kNoClass + 1.0f);
        const I32 kept = counted & I32(weight.v[r] >= rules.keep_above);
        store(tile + (row + r) * stride + i, select(kept, weight.v[r], F32{}));
        active += __builtin_popcount(bits(kept));
        inter += select(counted, weight.v[r] * c.v[r], F32{});
        dropped += select(counted & ~kept, weight.v[r], F32{});
        const F32 other = select(counted, c.v[r], broadcast(-2.0f));
        hardest_row = select(I32(other > hardest), broadcast_int(row + r), hardest_row);
        hardest = select(I32(other > hardest), other, hardest);
      }
    }
    for (int lane = 0; lane < kLanes && i + lane < group.count; ++lane) {
      sums.inter[i + lane] += inter[lane];
      sums.dropped[i + lane] += dropped[lane];
      if (hardest[lane] > sums.hardest[i + lane]) {
        sums.hardest[i + lane] = hardest[lane];
        sums.hardest_class[i + lane] = static_cast<int32_t>(block.first) + hardest_row[lane];
      }
    }
  }
  return active;
}

// Moves what add_unit_rows summed to the rows of the task.
void flush_dense_grad(const Group& group, RowSums& sums, Workspace& work) {
  finish_unit_rows(group, work);
  if (!work.has_dense_grad) return;
  const int padded_d = group.padded_d;
  work.has_dense_grad = false;
  for (int i = 0; i < group.count; ++i) {
    float* grad = sums.grad + static_cast<int64_t>(i) * padded_d;
    if (!sums.touched[i]) std::memset(grad, 0, sizeof(float) * padded_d);
    sums.touched[i] = 1;
    for (int k = 0; k < padded_d; k += kPanel)
      axpy(1 / kDenseGradScale, work.dense_grad.data.get() + static_cast<int64_t>(k) * kGroupSamples + i * kPanel,
           grad + k, kPanel);
  }
}
