#include "class_sums.h"

namespace sface {

namespace {

// Words of the arena that a record of a block of `pairs` stands for; −1 where it is no record.
int64_t record_words(const Kernels& kernels, int64_t count, int64_t pairs, int64_t far_tile) {
  if (count == kDenseStored) return pairs;
  if (count == kRecompute) return 0;
  if (count >= 0) return count <= pairs ? 2 * count : -1;
  const int64_t near = kFar - count;
  return kernels.add_far && near <= pairs ? 2 * near + far_tile : -1;
}

// Raises where a record points out of the arena.
Ways check_segments(const Problem& problem, const Kernels& kernels, const Tensor& segments, int64_t words) {
  check_tensor("segments", segments, ScalarType::Long, {2 * problem.groups * problem.blocks});
  const Segment* records = reinterpret_cast<const Segment*>(segments.const_data_ptr<int64_t>());
  Ways ways{};
  for (int64_t g = 0; g < problem.groups; ++g)
    for (int64_t b = 0; b < problem.blocks; ++b) {
      const auto [begin, count] = records[g * problem.blocks + b];
      const int64_t pairs = problem.group_count(g) * problem.block_rows(b);
      const int64_t far_tile = problem.block_rows(b) * far_words(static_cast<int>(problem.group_count(g)));
      const int64_t size = record_words(kernels, count, pairs, far_tile);
      check(size >= 0 && begin >= 0 && begin <= words && size <= words - begin,
            "segments: expected a part of an arena of ", words, " words, got ", begin, " and ", count, " for samples ",
            g, " and classes ", b);
      ways.dense |= count == kDenseStored;
      ways.far |= count <= kFar;
      ways.recompute |= count == kRecompute;
    }
  return ways;
}

template <typename T>
const T* data_of(const char* name, const Tensor& t, ScalarType dtype, int64_t size) {
  check_tensor(name, t, dtype, {size});
  return t.const_data_ptr<T>();
}

}  // namespace

Upstream::Upstream(const Problem& problem, const Tensor& grad_row, const Tensor& target_weight, float scale)
    : u(problem.n), own(problem.n) {
  const float* given = data_of<float>("grad_row", grad_row, ScalarType::Float, problem.n);
  const float* weight = data_of<float>("target_weight", target_weight, ScalarType::Float, problem.n);
  for (int64_t i = 0; i < problem.n; ++i) {
    if (problem.ignored(i)) continue;
    u[i] = given[i] * scale;
    own[i] = u[i] * weight[i];
    poisoned |= !is_finite(own[i]) || !is_finite(u[i]);
  }
}

SavedPairs::SavedPairs(const Tensor& x, const Tensor& w, const Tensor& target, const Tensor& grad_row,
                       const Hyper& hyper, const Tensor& inv_norm_, const Tensor& target_weight, const Tensor& arena,
                       const Tensor& segments_, float scale)
    : problem(x, w, target),
      kernels(sface::kernels()),
      words(data_of<int32_t>("arena", arena, ScalarType::Int, arena.numel())),
      ways(check_segments(problem, kernels, segments_, arena.numel())),
      segments(reinterpret_cast<const Segment*>(segments_.const_data_ptr<int64_t>())),
      inv_norm(data_of<float>("inv_norm", inv_norm_, ScalarType::Float, problem.c)),
      up(problem, grad_row, target_weight, scale),
      samples(problem, kernels, ways.recompute ? layouts_of(hyper, problem.d, kernels) : Samples::Layouts{}),
      rules(make_rules(hyper, problem.d, own_shares(problem, kernels, samples, target_weight.const_data_ptr<float>()))),
      call{problem, kernels, rules, samples} {
  if (ways.dense || ways.recompute) {
    columns =
        Uninitialised<float>(ceil_div(problem.n, kernels.panel_samples) * problem.padded_d * kernels.column_words);
    for (const Group& group : samples.groups)
      kernels.pack_features(group.rows, group.count, group.padded_d, columns_of(group));
  }
  if (ways.far || (ways.recompute && rules.far)) {
    far_columns = Uninitialised<int32_t>(ceil_div(problem.n, kFarPanel) * kFarPanel / 2 * problem.padded_d);
    for (const Group& group : samples.groups)
      kernels.pack_far(group.rows, group.count, group.padded_d, far_columns_of(group));
  }
}

float* SavedPairs::columns_of(const Group& group) const {
  return columns.data.get() + group.first / kernels.panel_samples * problem.padded_d * kernels.column_words;
}

int32_t* SavedPairs::far_columns_of(const Group& group) const {
  return far_columns.data.get() + group.first / 2 * problem.padded_d;
}

// The part of one group of samples, as the forward left it.
void BlockSums::add_segment(int64_t g, int64_t b) {
  const Group& group = saved_.samples.groups[g];
  const Segment& segment = saved_.segments[g * saved_.problem.blocks + b];
  Block block = saved_.problem.block_of(g, b, own_);
  if (segment.count == kRecompute) {
    const int64_t count = recompute(group, block);
    add_record(group, block, count, again_.data());
  } else {
    add_record(group, block, segment.count, saved_.words + segment.begin);
  }
  Run run;
  for (const OwnClass& own : own_)
    add(block, own.row, group.first + own.sample, saved_.up.own[group.first + own.sample], run);
  add(block, run);
}

void BlockSums::add_record(const Group& group, Block& block, int64_t count, const int32_t* words) {
  if (count >= 0) return add_pairs(group, block, words, count);
  const Problem& problem = saved_.problem;
  // what write_row reads next; rows of another dtype are converted one by one
  if (problem.float_weight())
    block.next = problem.weight_rows(block.first, block.count, work_.converted, &block.row_stride);
  const float* const u = &saved_.up.u[group.first];
  float* const raw = rows_.touch_all();
  if (count == kDenseStored)
    return saved_.kernels.add_dense(saved_.rules, reinterpret_cast<const float*>(words), group.count, u, block,
                                    saved_.columns_of(group), group.count, group.padded_d, raw, work_);
  const int64_t near = kFar - count;
  saved_.kernels.add_far(words + 2 * near, u, block, saved_.far_columns_of(group), group.count, group.padded_d, raw,
                         work_);
  add_pairs(group, block, words, near);
}

void BlockSums::add(const Block& block, int row, int64_t sample, float scale, Run& run) {
  if (row != run.row || run.count == Run::kMost) add(block, run);
  run.row = row;
  run.scale[run.count] = scale;
  run.x[run.count++] = saved_.samples.row(sample);
}

void BlockSums::add(const Block& block, Run& run) {
  if (run.count == 0) return;
  if (!rows_.row(run.row)) saved_.problem.fetch_row(block.first + run.row);  // that row_gradient reads soon
  const auto [raw, first] = rows_.touch(run.row);
  saved_.kernels.add_rows(run.count, run.scale, run.x, first, raw, static_cast<int>(saved_.problem.padded_d));
  run.count = 0;
}

void BlockSums::add_pairs(const Group& group, const Block& block, const int32_t* words, int64_t count) {
  Run run;
  for (int64_t e = 0; e < count; ++e) {
    const int row = words[2 * e] >> 16, in_group = words[2 * e] & 0xffff;
    check(row >= 0 && row < block.count && in_group < group.count, "arena: expected a pair of ", block.count,
          " classes and ", group.count, " samples, got ", row, " and ", in_group);
    const int64_t sample = group.first + in_group;
    float weight;
    std::memcpy(&weight, words + 2 * e + 1, sizeof(weight));
    add(block, row, sample, saved_.up.u[sample] * weight, run);
  }
  add(block, run);
}

// The block's forward again, with an arena of its own, which has room for every pair.
int64_t BlockSums::recompute(const Group& group, Block block) {
  block.w = saved_.problem.weight_rows(block.first, block.count, work_.converted, &block.row_stride);
  again_.resize(kBlockClasses * kGroupSamples);
  if (!unread_) unread_.emplace(kGroupSamples);
  Task task{
      .sums = unread_->of(0), .arena = {true, again_.data(), 0, static_cast<int64_t>(again_.size())}, .tally = {}};
  work_.skip_screens = work_.skip_int8 = 0;
  return saved_.kernels.forward_block(saved_.rules, group, block, task, work_);
}

RowGradient row_gradient(const Kernels& kernels, float* raw, const WeightRow& row, int d, float scale) {
  constexpr float kShortRow = 0x1p-20f, kLongRow = 0x1p20f;
  const float inv = row.inv_norm;
  // below kNormEps normalize divides by a constant, so nothing is projected away
  const float along = inv >= 1 / kNormEps ? 0.0f : kernels.dot(raw, row.w, d) * inv;
  if (inv > 1 / kShortRow || inv < 1 / kLongRow) {  // fp32 might not hold along/‖w‖²
    kernels.axpy(-along * inv, row.w, raw, d);
    return {scale * inv, raw, 0, row.w, row.factor};
  }
  return {scale * inv, raw, -along * inv * inv * scale, row.w, row.factor};
}

RowGradient row_gradient(const SavedPairs& saved, float* raw, int64_t cls, float scale, std::vector<float>& converted) {
  const WeightRow row = saved.problem.weight_row(cls, saved.inv_norm[cls], converted);
  return row_gradient(saved.kernels, raw, row, static_cast<int>(saved.problem.d), scale);
}

void write_row(const SavedPairs& saved, float* raw, int64_t cls, float scale, std::vector<float>& converted,
               float* out) {
  const int d = static_cast<int>(saved.problem.d);
  if (is_nan(saved.inv_norm[cls])) {
    std::fill(out, out + d, saved.inv_norm[cls]);
  } else if (raw == nullptr) {
    saved.kernels.zero(out, d);
  } else {
    const RowGradient row = row_gradient(saved, raw, cls, scale, converted);
    saved.kernels.combine(row.scale, row.raw, row.along, row.w, out, d);
    if (row.factor != 1)
      for (int k = 0; k < d; ++k) out[k] *= row.factor;
  }
}

}  // namespace sface
