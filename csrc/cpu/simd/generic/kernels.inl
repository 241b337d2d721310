// A block of classes from start to end, and the table of kernels of this instruction set.
// Included last, inside the namespace and the target region of one instruction set.

// Share of candidates above which products beat rescoring pair by pair. Measured with AVX-512 at N=128, lists alone and
// products alone: at D=512 37 and 42 ms with 0.15 active, 52 and 42 with 0.25; at D=128 16 and 17, then 17 and 17.
constexpr double kDenseShare = 0.18;
// After a dense block this many are taken to be dense without a screen to tell. A screen takes about a sixth of a dense
// block, so one in 16 costs a hundredth.
constexpr int kBlindBlocks = 15;

// 1/‖w‖ of each row, Σ ŵ over the block where it is wanted, and the rows in fixed point where they are screened.
inline void prepare_rows(const Block& block, int d, int padded_d, bool sum_classes, bool screen, Workspace& work) {
  for (int start = 0; start < block.rows; start += kRowsAtOnce) {
    const float* rows[kRowsAtOnce];
    float squares[kRowsAtOnce], inv[kRowsAtOnce] = {};
    bool all_finite = true;
    // past the last row: that row again, 0 times
    for (int r = 0; r < kRowsAtOnce; ++r)
      rows[r] = block.w + (start + r < block.rows ? start + r : block.rows - 1) * block.row_stride;
    sums_of_squares(rows, d, squares);
    for (int r = 0; r < kRowsAtOnce && start + r < block.rows; ++r) {
      const double norm = row_norm(rows[r], d, squares[r]);
      inv[r] = finite(norm) ? static_cast<float>(1.0 / (norm < kNormEps ? kNormEps : norm)) : __builtin_nanf("");
      work.inv_norm[start + r] = inv[r];
      all_finite &= finite(norm);
    }
    if (screen)
      for (int r = 0; r < kRowsAtOnce && start + r < block.rows; ++r) {
        int16_t* fixed =
            reinterpret_cast<int16_t*>(work.pairs.data() + static_cast<int64_t>(start + r) * (padded_d / 2));
        if (finite(inv[r])) {
          to_fixed_point(rows[r], d, padded_d, inv[r] * kScale, fixed);
        } else {
          std::memset(fixed, 0, sizeof(int16_t) * padded_d);
        }
      }
    // a row that is not finite makes every loss NaN: what Σ ŵ holds then is not read
    if (sum_classes && all_finite) add_scaled(rows, inv, d, work.class_sum.data());
  }
}

inline int64_t count_candidates(const Group& group, const Block& block, const Workspace& work) {
  int64_t found = 0;
  for (int row = 0; row < block.rows; ++row)
    for (int panel = 0; panel < group.panels; ++panel)
      found += __builtin_popcount(work.candidates[row * group.panels + panel] & group.counts[panel]);
  return found;
}

inline int64_t dense_block(const Rules& rules, const Group& group, const Block& block, int d, int padded_d,
                           RowSums& sums, Arena& arena, Workspace& work, Work& done) {
  cosine_tile(group, block, d, work);
  for (int panel = 0; panel < group.panels; ++panel)
    done.dense_pairs += static_cast<int64_t>(block.rows) * __builtin_popcount(group.counts[panel]);
  done.active += coefficient_tile<true>(rules, group, block, work, &sums);
  if (sums.grad) add_unit_rows(group, block, d, padded_d, work);
  const int64_t words = static_cast<int64_t>(block.rows) * group.count;
  if (arena.used + words > arena.capacity) return kRecompute;
  for (int row = 0; row < block.rows; ++row, arena.used += group.count)
    std::memcpy(arena.words + arena.used, work.tile.data() + row * group.panels * kPanel, sizeof(float) * group.count);
  return kDenseStored;
}

int64_t forward_block(const Rules& rules, const Group& group, const Block& block, int d, int padded_d, bool sum_classes,
                      RowSums& sums, Arena& arena, Workspace& work, Work& done) {
  prepare_rows(block, d, padded_d, sum_classes, rules.screen && work.skip_screens == 0, work);
  if (!rules.screen || work.skip_screens > 0) {
    work.skip_screens -= rules.screen;
    return dense_block(rules, group, block, d, padded_d, sums, arena, work, done);
  }
  const int stride = group.panels * kPanel;
  std::memset(work.below.data(), 0, sizeof(float) * stride);
  std::memset(work.below_weight.data(), 0, sizeof(float) * stride);
  if (rules.cheap_below) {
    screen_block<true>(rules, group, block, padded_d, sums, work);
  } else {
    screen_block<false>(rules, group, block, padded_d, sums, work);
  }
  if (count_candidates(group, block, work) > kDenseShare * block.rows * group.count) {
    work.skip_screens = kBlindBlocks;
    return dense_block(rules, group, block, d, padded_d, sums, arena, work, done);
  }

  for (int i = 0; i < group.count; ++i) {
    sums.inter[i] += work.below[i];
    sums.dropped[i] += work.below_weight[i];
  }
  const int64_t begin = arena.used;
  if (rescore_block(rules, group, block, d, padded_d, sums, arena, work, done)) return (arena.used - begin) / 2;
  arena.used = begin;
  return kRecompute;
}

const Kernels kTable = {
    .name = kName,
    .panel_samples = kPanel,
    .strip_rows = kStripRows,
    .pack_panel = pack_panel,
    .forward_block = forward_block,
    .flush_dense_grad = flush_dense_grad,
    .recompute_tile = recompute_tile,
    .add_dense = add_dense,
    .pack_features = pack_features,
    .dot = dot,
    .axpy = axpy,
    .combine = combine,
    .zero = zero,
    .intra = intra,
};
