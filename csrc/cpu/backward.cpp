// ∂w on a CPU, equation (8), from the list of active pairs that the forward left.
//
// Writes each row of ∂w once; reads only the rows of w that have a gradient. A task is a range of class blocks, and no
// two tasks write the same row.
#include "ops.h"
#include "problem.h"

namespace sface {

namespace {

struct Upstream {
  std::vector<float> u;    // [N], 0 for rows that do not count
  std::vector<float> own;  // [N], u_i times the own class's weight −p_i / s
  bool poisoned = false;   // a NaN row is active with every class
};

Upstream read_upstream(const Problem& problem, const Tensor& grad_row, const Tensor& target_weight) {
  Upstream up;
  up.u.resize(problem.n);
  up.own.resize(problem.n);
  const float *u = grad_row.const_data_ptr<float>(), *own = target_weight.const_data_ptr<float>();
  for (int64_t i = 0; i < problem.n; ++i) {
    if (problem.ignored(i)) continue;
    up.u[i] = u[i];
    up.own[i] = u[i] * own[i];
    up.poisoned |= !is_finite(up.own[i]) || !is_finite(up.u[i]);
  }
  return up;
}

// Raises where a record points out of the arena.
void check_segment(const Problem& problem, int64_t g, int64_t b, const Segment& segment, int64_t words) {
  const int64_t begin = segment.begin, count = segment.count;
  const int64_t pairs = problem.group_count(g) * problem.block_rows(b);
  const bool known = count >= kRecompute && count <= pairs;
  const int64_t size = !known || count == kRecompute ? 0 : count == kDenseStored ? pairs : 2 * count;
  check(known && begin >= 0 && begin <= words && size <= words - begin, "segments: expected a part of an arena of ",
        words, " words, got ", begin, " and ", count, " for samples ", g, " and classes ", b);
}

// The sums Σ_i u_i g_ij x̂_i / s of one block, in work.raw; which rows have one, in `touched`.
class BlockSums {
 public:
  BlockSums(const Call& call, const Upstream& up, const std::vector<float>& columns, Workspace& work)
      : call_(call), up_(up), columns_(columns), work_(work), scaled_(kBlockClasses * kGroupSamples) {}

  // Starts the next block.
  void begin() { std::fill(touched_, touched_ + kBlockClasses, false); }

  // The sum of one row, null where nothing was added.
  const float* row(int row) const { return touched_[row] ? work_.raw.data() + row * call_.problem.padded_d : nullptr; }

  // The part of one group of samples, as the forward left it.
  void add_segment(int64_t g, int64_t b, const Segment& segment, const int32_t* arena, const float* inv_norm) {
    const Group& group = call_.samples.groups[g];
    Block block = call_.problem.block_of(g, b, own_);
    if (segment.count == kRecompute) {
      recompute(group, block, inv_norm + block.first);
    } else if (segment.count == kDenseStored) {
      add_tile(group, block.count, arena + segment.begin, group.count);
    } else {
      add_pairs(group, block.count, arena + segment.begin, segment.count);
    }
    for (const OwnClass& own : own_) add(own.row, group.first + own.sample, up_.own[group.first + own.sample]);
  }

 private:
  void add(int row, int64_t sample, float scale) {
    call_.kernels.axpy(scale, call_.samples.row(sample), touch(row), static_cast<int>(call_.problem.padded_d));
  }

  void add_pairs(const Group& group, int rows, const int32_t* words, int64_t count) {
    for (int64_t e = 0; e < count; ++e) {
      const int row = words[2 * e] >> 16, in_group = words[2 * e] & 0xffff;
      check(row >= 0 && row < rows && in_group < group.count, "arena: expected a pair of ", rows, " classes and ",
            group.count, " samples, got ", row, " and ", in_group);
      const int64_t sample = group.first + in_group;
      float weight;
      std::memcpy(&weight, words + 2 * e + 1, sizeof(weight));
      add(row, sample, up_.u[sample] * weight);
    }
  }

  // `tile` holds floats, [rows] with a stride of so many.
  void add_tile(const Group& group, int rows, const void* tile, int64_t stride) {
    for (int row = 0; row < rows; ++row) {
      touch(row);
      float* scaled = &scaled_[row * group.count];
      std::memcpy(scaled, static_cast<const char*>(tile) + row * stride * sizeof(float), sizeof(float) * group.count);
      for (int i = 0; i < group.count; ++i) scaled[i] *= up_.u[group.first + i];
    }
    call_.kernels.add_dense(scaled_.data(), group.count, rows, &columns_[group.first * group.padded_d], group.count,
                            group.padded_d, work_.raw.data());
  }

  void recompute(const Group& group, Block& block, const float* inv_norm) {
    block.w = call_.problem.weight_rows(block.first, block.count, work_.converted, &block.row_stride);
    if (std::any_of(inv_norm, inv_norm + block.count, [](float inv) { return inv < 0; })) shorten(block, inv_norm);
    for (int r = 0; r < block.count; ++r) work_.inv_norm[r] = std::abs(inv_norm[r]);
    call_.kernels.recompute_tile(call_.rules, group, block, work_);
    add_tile(group, block.count, work_.tile.data(), group.panels * call_.kernels.panel_samples);
  }

  // As the forward did: the rows whose inv_norm is negative.
  void shorten(Block& block, const float* inv_norm) {
    const int64_t d = call_.problem.d;
    float* rows = work_.short_rows.data.get();
    for (int r = 0; r < block.count; ++r)
      for (int64_t k = 0; k < d; ++k)
        rows[r * d + k] = block.w[r * block.row_stride + k] * (inv_norm[r] < 0 ? kShortening : 1);
    block.w = rows;
    block.row_stride = d;
  }

  float* touch(int row) {
    float* raw = work_.raw.data() + row * call_.problem.padded_d;
    if (!touched_[row]) std::memset(raw, 0, sizeof(float) * call_.problem.padded_d);
    touched_[row] = true;
    return raw;
  }

  const Call& call_;
  const Upstream& up_;
  const std::vector<float>& columns_;  // x̂ as Kernels::pack_features writes it, for dense tiles
  Workspace& work_;
  std::vector<OwnClass> own_;
  std::vector<float> scaled_;  // [rows][group] u_i g_ij / s
  bool touched_[kBlockClasses];
};

// A row of ∂w from its raw sum (null: there is none), the tangent of (8).
void write_row(const Call& call, const float* raw, int64_t cls, float inv_norm, std::vector<float>& converted,
               float* out) {
  const int d = static_cast<int>(call.problem.d);
  if (is_nan(inv_norm)) {
    std::fill(out, out + d, inv_norm);
  } else if (raw == nullptr) {
    call.kernels.zero(out, d);
  } else {
    const WeightRow row = call.problem.weight_row(cls, inv_norm, converted);
    const float s = call.rules.hyper.s, inv = row.inv_norm;
    // below kNormEps normalize divides by a constant, so nothing is projected away
    const float along = inv >= 1 / kNormEps ? 0.0f : call.kernels.dot(raw, row.w, d) * inv;
    call.kernels.combine(s * inv, raw, -along * inv * inv * s, row.w, out, d);
    if (row.factor != 1)
      for (int k = 0; k < d; ++k) out[k] *= row.factor;
  }
}

// The rows of ∂w of one block from their sums, in the dtype of the weight.
template <typename T>
void write_block(const Call& call, int64_t b, const BlockSums& sums, const float* inv_norm, Workspace& work,
                 std::vector<float>& row, T* grad) {
  const int64_t d = call.problem.d;
  for (int r = 0; r < call.problem.block_rows(b); ++r) {
    const int64_t cls = b * kBlockClasses + r;
    T* out = grad + cls * d;
    if constexpr (std::is_same_v<T, float>) {
      write_row(call, sums.row(r), cls, inv_norm[cls], work.converted, out);
    } else {
      write_row(call, sums.row(r), cls, inv_norm[cls], work.converted, row.data());
      for (int64_t k = 0; k < d; ++k) out[k] = static_cast<T>(row[k]);
    }
  }
}

}  // namespace

Tensor native_grad_weight(const Tensor& x, const Tensor& w, const Tensor& target, const Tensor& grad_row, double s,
                          double k_intra, double k_inter, double a, double b, double filter_eps, const Tensor& inv_norm,
                          const Tensor& target_weight, const Tensor& arena, const Tensor& segments) {
  const Problem problem(x, w, target);
  check_tensor("grad_row", grad_row, ScalarType::Float, {problem.n});
  check_tensor("inv_norm", inv_norm, ScalarType::Float, {problem.c});
  check_tensor("target_weight", target_weight, ScalarType::Float, {problem.n});
  check_tensor("arena", arena, ScalarType::Int, {arena.numel()});
  check_tensor("segments", segments, ScalarType::Long, {2 * problem.groups * problem.blocks});
  const Kernels& kernels = sface::kernels();
  const Rules rules = make_rules(make_hyper(s, k_intra, k_inter, a, b, filter_eps), problem.d);
  const Upstream up = read_upstream(problem, grad_row, target_weight);
  Tensor grad = empty_gradient(w);
  if (up.poisoned) return torch::stable::fill_(grad, std::numeric_limits<double>::quiet_NaN());

  const Segment* records = reinterpret_cast<const Segment*>(segments.const_data_ptr<int64_t>());
  const int32_t* words = arena.const_data_ptr<int32_t>();
  const float* inv = inv_norm.const_data_ptr<float>();
  bool any_dense = false, any_recompute = false;
  for (int64_t g = 0; g < problem.groups; ++g)
    for (int64_t b = 0; b < problem.blocks; ++b) {
      const Segment& record = records[g * problem.blocks + b];
      check_segment(problem, g, b, record, arena.numel());
      any_dense |= record.count < 0;
      any_recompute |= record.count == kRecompute;
    }
  const Samples samples(problem, kernels, {.columns = any_recompute, .fixed_point = false, .int8 = false});
  const Call call{problem, kernels, rules, samples};
  std::vector<float> columns(any_dense ? problem.n * problem.padded_d : 0);
  if (any_dense)
    for (const Group& group : samples.groups)
      kernels.pack_features(group.rows, group.count, group.padded_d, &columns[group.first * group.padded_d]);

  constexpr int64_t kBlocksPerTask = 16;
  const int64_t tasks = ceil_div(problem.blocks, kBlocksPerTask);
  void* const out = grad.mutable_data_ptr();
  for_each_worker(tasks, [&](auto next_task) {
    Workspace work = make_workspace(problem, kernels);
    BlockSums sums(call, up, columns, work);
    std::vector<float> row(problem.d);
    for (int64_t task; (task = next_task()) < tasks;) {
      const int64_t last = std::min(problem.blocks, (task + 1) * kBlocksPerTask);
      for (int64_t b = task * kBlocksPerTask; b < last; ++b) {
        sums.begin();
        for (int64_t g = 0; g < problem.groups; ++g)
          sums.add_segment(g, b, records[g * problem.blocks + b], words, inv);
        if (problem.float_weight()) {
          write_block(call, b, sums, inv, work, row, static_cast<float*>(out));
        } else if (problem.weight_type == ScalarType::Half) {
          write_block(call, b, sums, inv, work, row, static_cast<Half*>(out));
        } else {
          write_block(call, b, sums, inv, work, row, static_cast<BFloat16*>(out));
        }
      }
    }
    kernels.finish_stores();
  });
  return grad;
}

}  // namespace sface
