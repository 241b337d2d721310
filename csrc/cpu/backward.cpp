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
  std::vector<float> own;  // [N], u_i times the target\'s weight −p_i / s
  bool poisoned = false;   // a NaN row is active with every class
};

Upstream read_upstream(const Problem& problem, const at::Tensor& grad_row, const at::Tensor& target_weight) {
  Upstream up;
  up.u.resize(problem.n);
  up.own.resize(problem.n);
  const float *u = grad_row.const_data_ptr<float>(), *own = target_weight.const_data_ptr<float>();
  for (int64_t i = 0; i < problem.n; ++i) {
    if (problem.ignored(i)) continue;
    up.u[i] = u[i];
    up.own[i] = u[i] * own[i];
    up.poisoned |= !std::isfinite(up.own[i]) || !std::isfinite(up.u[i]);
  }
  return up;
}

// The sums Σ_i u_i g_ij x̂_i / s of one block, in work.raw; which rows have one, in `touched`.
class BlockSums {
 public:
  BlockSums(const Problem& problem, const Kernels& kernels, const Rules& rules, const Samples& samples,
            const Upstream& up, const std::vector<float>& columns, Workspace& work)
      : problem_(problem),
        kernels_(kernels),
        rules_(rules),
        samples_(samples),
        up_(up),
        columns_(columns),
        work_(work),
        scaled_(kBlockClasses * kGroupSamples) {}

  bool touched[kBlockClasses];

  void begin() { std::fill(touched, touched + kBlockClasses, false); }

  void add(int row, int64_t sample, float scale) {
    float* raw = touch(row);
    kernels_.axpy(scale, samples_.row(sample), raw, static_cast<int>(problem_.padded_d));
  }

  void add_pairs(const Group& group, const int32_t* words, int64_t count) {
    for (int64_t e = 0; e < count; ++e) {
      const int row = words[2 * e] >> 16;
      const int64_t sample = group.first + (words[2 * e] & 0xffff);
      float weight;
      std::memcpy(&weight, words + 2 * e + 1, sizeof(weight));
      add(row, sample, up_.u[sample] * weight);
    }
  }

  void add_tile(const Group& group, int rows, const float* tile, int64_t stride) {
    for (int row = 0; row < rows; ++row) {
      touch(row);
      for (int i = 0; i < group.count; ++i)
        scaled_[row * group.count + i] = tile[row * stride + i] * up_.u[group.first + i];
    }
    kernels_.add_dense(scaled_.data(), group.count, rows, &columns_[group.first * problem_.padded_d], group.count,
                       static_cast<int>(problem_.padded_d), work_.raw.data());
  }

  void recompute(int64_t g, const Block& block, const float* inv_norm) {
    const Group& group = samples_.groups[g];
    std::copy(inv_norm, inv_norm + block.rows, work_.inv_norm.begin());
    kernels_.recompute_tile(rules_, group, block, static_cast<int>(problem_.d), work_);
    add_tile(group, block.rows, work_.tile.data(), group.panels * kernels_.panel_samples);
  }

 private:
  float* touch(int row) {
    float* raw = work_.raw.data() + row * problem_.padded_d;
    if (!touched[row]) std::memset(raw, 0, sizeof(float) * problem_.padded_d);
    touched[row] = true;
    return raw;
  }

  const Problem& problem_;
  const Kernels& kernels_;
  const Rules& rules_;
  const Samples& samples_;
  const Upstream& up_;
  const std::vector<float>& columns_;
  Workspace& work_;
  std::vector<float> scaled_;  // [rows][group] u_i g_ij / s
};

// A row of ∂w from its raw sum, the tangent of (8), in the dtype of the weight.
template <typename T>
void write_row(const Kernels& kernels, const float* raw, const float* w, float inv, float s, int d,
               std::vector<float>& row, T* out) {
  float* target = std::is_same_v<T, float> ? reinterpret_cast<float*>(out) : row.data();
  if (raw == nullptr) {
    kernels.zero(target, d);
  } else if (std::isnan(inv)) {
    std::fill(target, target + d, inv);
  } else {
    // below kNormEps normalize divides by a constant, so nothing is projected away
    const float along = inv >= 1 / kNormEps ? 0.0f : kernels.dot(raw, w, d) * inv;
    kernels.combine(s * inv, raw, -along * inv * inv * s, w, target, d);
  }
  if constexpr (!std::is_same_v<T, float>)
    for (int k = 0; k < d; ++k) out[k] = static_cast<T>(row[k]);
}

}  // namespace

at::Tensor native_grad_weight(const at::Tensor& x, const at::Tensor& w, const at::Tensor& target,
                              const at::Tensor& grad_row, double s, double k_intra, double k_inter, double a, double b,
                              double filter_eps, const at::Tensor& inv_norm, const at::Tensor& target_weight,
                              const at::Tensor& arena, const at::Tensor& segments) {
  const Problem problem(x, w, target);
  const Kernels& kernels = sface::kernels();
  const Rules rules = make_rules(make_hyper(s, k_intra, k_inter, a, b, filter_eps), problem.d);
  const Upstream up = read_upstream(problem, grad_row, target_weight);
  at::Tensor grad = empty_gradient(problem.c, problem.d, w.scalar_type());
  if (up.poisoned) return grad.fill_(std::numeric_limits<double>::quiet_NaN());

  const int64_t* records = segments.const_data_ptr<int64_t>();
  const int32_t* words = arena.const_data_ptr<int32_t>();
  const float* inv = inv_norm.const_data_ptr<float>();
  bool any_dense = false, any_recompute = false;
  for (int64_t k = 0; k < problem.groups * problem.blocks; ++k) {
    any_dense |= records[2 * k + 1] < 0;
    any_recompute |= records[2 * k + 1] == kRecompute;
  }
  const Samples samples(problem, kernels, {.columns = any_recompute, .pairs = false});
  std::vector<float> columns(any_dense ? problem.n * problem.padded_d : 0);
  if (any_dense)
    for (const Group& group : samples.groups)
      kernels.pack_features(group.rows, group.count, static_cast<int>(problem.padded_d),
                            &columns[group.first * problem.padded_d]);

  constexpr int64_t kBlocksPerTask = 16;
  const int64_t tasks = ceil_div(problem.blocks, kBlocksPerTask);
  for_each_worker(tasks, [&](auto next_task) {
    Workspace work = make_workspace(problem, kernels);
    BlockSums sums(problem, kernels, rules, samples, up, columns, work);
    std::vector<OwnClass> own;
    std::vector<float> row(problem.d);
    for (int64_t task; (task = next_task()) < tasks;) {
      const int64_t last = std::min(problem.blocks, (task + 1) * kBlocksPerTask);
      for (int64_t at_block = task * kBlocksPerTask; at_block < last; ++at_block) {
        Block block{};
        block.first = at_block * kBlockClasses;
        block.rows = problem.block_rows(at_block);
        sums.begin();
        for (int64_t g = 0; g < problem.groups; ++g) {
          const int64_t* record = records + (g * problem.blocks + at_block) * 2;
          const Group& group = samples.groups[g];
          problem.own_classes(g, at_block, own);
          if (record[1] == kRecompute) {
            block.w = problem.rows(block.first, block.rows, work.converted, &block.row_stride);
            block.own = own.data();
            block.own_count = static_cast<int>(own.size());
            sums.recompute(g, block, inv + block.first);
          } else if (record[1] == kDenseStored) {
            sums.add_tile(group, block.rows, reinterpret_cast<const float*>(words + record[0]), group.count);
          } else {
            sums.add_pairs(group, words + record[0], record[1]);
          }
          for (const OwnClass& target : own)
            sums.add(target.row, group.first + target.sample, up.own[group.first + target.sample]);
        }
        for (int r = 0; r < block.rows; ++r) {
          const int64_t cls = block.first + r;
          const bool has_gradient = sums.touched[r] || std::isnan(inv[cls]);
          const float* raw = has_gradient ? work.raw.data() + r * problem.padded_d : nullptr;
          int64_t stride = 0;
          const float* w_row = has_gradient ? problem.rows(cls, 1, work.converted, &stride) : nullptr;
          const auto write = [&](auto* data) {
            write_row(kernels, raw, w_row, inv[cls], rules.hyper.s, static_cast<int>(problem.d), row,
                      data + cls * problem.d);
          };
          if (w.scalar_type() == at::kFloat) {
            write(grad.mutable_data_ptr<float>());
          } else if (w.scalar_type() == at::kHalf) {
            write(grad.mutable_data_ptr<at::Half>());
          } else {
            write(grad.mutable_data_ptr<at::BFloat16>());
          }
        }
      }
    }
  });
  return grad;
}

}  // namespace sface
