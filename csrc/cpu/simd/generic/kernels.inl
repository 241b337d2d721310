// A block of classes from start to end, and the table of kernels of this instruction set.
// Included last, inside the namespace and the target region of one instruction set.

// After a dense block this many are taken to be dense without a screen to tell. A screen takes about a sixth of a dense
// block, so one in 16 costs a hundredth.
constexpr int kBlindBlocks = 15;

// Rows from `first` on that are longer than kLongestRow, times kShortening: the block is a copy from here on. The rows
// before were found not to be, by a sum in another order.
__attribute__((noinline, cold)) void shorten_rows(int first, int d, Block& block, Workspace& work) {
  float* out = work.short_rows.data.get();
  for (int row = 0; row < block.count; ++row, out += d) {
    const float* w = block.w + row * block.row_stride;
    const double norm = row_norm(w, d, dot(w, w, d));
    const bool is_long = row >= first && norm > kLongestRow && is_finite(norm);
    if (is_long) work.shortened |= uint64_t{1} << row;
    for (int k = 0; k < d; ++k) out[k] = is_long ? w[k] * kShortening : w[k];
  }
  block.w = work.short_rows.data.get();
  block.row_stride = d;
}

enum class Screening { kNone, kInt16, kInt8 };

// 1/‖w‖ of each row, Σ ŵ over the block where it is wanted, and the rows in what they are screened in.
inline void prepare_rows(const Group& group, Block& block, Screening screening, Ahead& ahead, Workspace& work) {
  const int d = group.d, padded_d = group.padded_d;
  if (screening == Screening::kInt8) Int8::plan(group, ahead);
  for (int start = 0; start < block.count; start += kRowsAtOnce) {
    const float* rows[kRowsAtOnce];
    float squares[kRowsAtOnce], largest[kRowsAtOnce], inv[kRowsAtOnce] = {};
    bool all_finite = true;
    const auto square = [&] {
      // past the last row: that row again, 0 times
      for (int r = 0; r < kRowsAtOnce; ++r)
        rows[r] = block.w + (start + r < block.count ? start + r : block.count - 1) * block.row_stride;
      if (screening == Screening::kInt8) {
        sums_of_squares<true>(rows, d, squares, largest);
      } else {
        sums_of_squares<false>(rows, d, squares, nullptr);
      }
    };
    square();
    bool any_long = false;
    for (int r = 0; r < kRowsAtOnce; ++r) any_long |= squares[r] > kLongestRow * kLongestRow;
    if (__builtin_expect(any_long, 0) && work.shortened == 0) {
      shorten_rows(start, d, block, work);
      square();
    }
    for (int r = 0; r < kRowsAtOnce && start + r < block.count; ++r) {
      const double norm = row_norm(rows[r], d, squares[r]);
      inv[r] = is_finite(norm) ? static_cast<float>(1.0 / (norm < kNormEps ? kNormEps : norm)) : __builtin_nanf("");
      work.inv_norm[start + r] = inv[r];
      all_finite &= is_finite(norm);
    }
    const bool summed = block.sum_rows && all_finite;
    if (screening == Screening::kInt8) {
      Int8::prepare_rows(rows, largest, inv, start, d, summed ? work.class_sum.data() : nullptr, ahead, work);
      continue;
    }
    if (screening == Screening::kInt16)
      for (int r = 0; r < kRowsAtOnce && start + r < block.count; ++r) {
        Int16* fixed =
            reinterpret_cast<Int16*>(work.fixed_point.data() + static_cast<int64_t>(start + r) * (padded_d / 2));
        if (is_finite(inv[r])) {
          to_fixed_point(rows[r], d, padded_d, inv[r] * kScale, fixed);
        } else {
          std::memset(fixed, 0, sizeof(int16_t) * padded_d);
        }
      }
    // a row that is not finite makes every loss NaN: what Σ ŵ holds then is not read
    if (summed) add_scaled(rows, inv, d, work.class_sum.data());
  }
}

// Of samples that take part with the classes, own ones among them.
inline int64_t pairs_in(const Group& group, const Block& block) {
  int64_t samples = 0;
  for (int panel = 0; panel < group.panels; ++panel) samples += __builtin_popcount(group.participates[panel]);
  return samples * block.count;
}

inline int64_t dense_block(const Rules& rules, const Group& group, const Block& block, Task& task, Ahead& ahead,
                           Workspace& work) {
  Arena& arena = task.arena;
  make_columns(group);
  if (task.sums.grad) {
    cosine_tile<true>(rules, group, block, work, &ahead);
  } else {
    cosine_tile<false>(rules, group, block, work, &ahead);
  }
  task.tally.dense_pairs += pairs_in(group, block);
  task.tally.active += coefficient_tile(rules, group, block, work, task.sums);
  if (task.sums.grad) add_unit_rows(group, block, work);
  const int64_t words = static_cast<int64_t>(block.count) * group.count;
  if (arena.used + words > arena.capacity) return kRecompute;
  for (int row = 0; row < block.count; ++row, arena.used += group.count)
    std::memcpy(arena.words + arena.used, work.tile.data() + row * group.panels * kPanel, sizeof(float) * group.count);
  return kDenseStored;
}

// After an int8 screen that left too many candidates without being active the next blocks are screened in int16.
constexpr int kInt16Blocks = 15;

inline Screening screening_of(const Rules& rules, const Group& group, Workspace& work) {
  if (!rules.screen || (rules.far && group.count < Far::kSamples)) return Screening::kNone;
  if (work.skip_screens > 0) {
    --work.skip_screens;
    return Screening::kNone;
  }
  if (rules.far || group.int8.words == nullptr) return Screening::kInt16;
  if (work.skip_int8 > 0) {
    --work.skip_int8;
    return Screening::kInt16;
  }
  return Screening::kInt8;
}

// By itself: among the others' code the loops of all of them would run short of registers.
__attribute__((noinline)) void screen_far(const Rules& rules, const Group& group, const Block& block, Ahead& ahead,
                                          RowSums& sums, Workspace& work) {
  if (rules.cheap_below) {
    screen_block(Int16Screen<true, true>(rules, group, work), group, block, ahead, sums, work);
  } else {
    screen_block(Int16Screen<false, true>(rules, group, work), group, block, ahead, sums, work);
  }
}

// The rest of a block of an exact call whose near pairs are listed: the far ones, whose coefficients stand in the tile.
inline int64_t far_block(const Group& group, const Block& block, int64_t begin, bool listed, int candidates, Task& task,
                         Workspace& work) {
  Arena& arena = task.arena;
  const int64_t near = (arena.used - begin) / 2, words = int64_t{block.count} * far_words(group.count);
  const int64_t pairs = pairs_in(group, block);
  task.tally.dense_pairs += pairs;
  task.tally.active += pairs - candidates;
  for (int i = 0; i < block.own_count; ++i)
    task.tally.active -= group.participates[block.own[i].sample / kPanel] >> block.own[i].sample % kPanel & 1;
  if (task.sums.grad) Far::add_unit_rows(group, block, work);
  if (!listed || arena.used + words > arena.capacity) {
    arena.used = begin;
    return kRecompute;
  }
  Far::store(group, block, work, arena);
  return kFar - near;
}

int64_t forward_block(const Rules& rules, const Group& group, const Block& given, Task& task, Workspace& work) {
  Block block = given;
  work.shortened = 0;
  const Screening screening = screening_of(rules, group, work);
  Ahead ahead(block);
  prepare_rows(group, block, screening, ahead, work);
  if (screening == Screening::kNone) return dense_block(rules, group, block, task, ahead, work);
  const int stride = group.panels * kPanel;
  std::memset(work.below.data(), 0, sizeof(float) * stride);
  std::memset(work.below_weight.data(), 0, sizeof(float) * stride);
  if (screening == Screening::kInt8) {
    Int8::screen(rules, group, block, ahead, task.sums, work);
  } else if (Far::kThere && rules.far) {
    screen_far(rules, group, block, ahead, task.sums, work);
  } else if (rules.cheap_below) {
    screen_block(Int16Screen<true, false>(rules, group, work), group, block, ahead, task.sums, work);
  } else {
    screen_block(Int16Screen<false, false>(rules, group, work), group, block, ahead, task.sums, work);
  }
  const int64_t pairs = int64_t{block.count} * group.count, before = task.tally.active;
  const double most = rules.far ? Far::near_share(group.d) : kDenseShare;
  const int candidates = list_candidates(group, block, static_cast<int64_t>(most * pairs), work);
  if (candidates < 0) {
    if (screening == Screening::kInt8) {
      work.skip_int8 = kInt16Blocks;  // it may leave fewer
    } else {
      work.skip_screens = kBlindBlocks;
    }
    return dense_block(rules, group, block, task, ahead, work);
  }

  for (int i = 0; i < group.count; ++i) {
    task.sums.inter[i] += work.below[i];
    if (!rules.far) task.sums.dropped[i] += work.below_weight[i];
  }
  const int64_t begin = task.arena.used;
  const bool listed = rescore_block(rules, group, block, candidates, task, work);
  const int64_t wasted = candidates - (task.tally.active - before);
  if (rules.far) return far_block(group, block, begin, listed, candidates, task, work);
  if (screening == Screening::kInt8 && wasted > Int8::kWaste * pairs) work.skip_int8 = kInt16Blocks;
  if (listed) return (task.arena.used - begin) / 2;
  task.arena.used = begin;
  return kRecompute;
}

int64_t scratch_bytes(int64_t padded_d) { return parts_bytes(padded_d) + Far::bytes(padded_d); }

const Kernels kTable = {
    .name = kName,
    .panel_samples = kPanel,
    .strip_rows = kStripRows,
    .column_words = kColumnWords,
    .parts_bytes = scratch_bytes,
    .pack_panel = pack_panel,
    .pack_columns = pack_columns,
    .pack_int8 = Int8::pack,
    .forward_block = forward_block,
    .flush_dense_grad = flush_dense_grad,
    .add_dense = add_dense,
    .pack_features = pack_features,
    .add_far = Far::add,
    .pack_far = Far::pack,
    .dot = dot,
    .axpy = axpy,
    .add_rows = add_rows,
    .combine = combine,
    .zero = zero,
    .finish_stores = finish_stores,
    .intra = intra,
    .sgd = sgd,
    .adamw = adamw,
};
