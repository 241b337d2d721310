// The forward on a CPU: row losses, statistics, ∂l_i/∂x_i, and what the backward needs for ∂w.
//
// Never materialises N×C; reads w from memory once, and again only the rows of the targets. A task is a range of
// classes and a group of samples; it owns its partial sums, which are added in a fixed order afterwards.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "ops.h"
#include "problem.h"

namespace sface {

namespace {

// Per range of classes and sample, in rows of N padded to whole groups.
struct Partials {
  int64_t stride, padded_d;
  std::vector<double> inter, dropped;
  std::vector<float> hardest;
  std::vector<int32_t> best, best_class;
  std::vector<uint8_t> touched;
  Uninitialised<float> grad;
  std::vector<float> class_sum;  // [ranges][padded D]
  std::vector<Work> work;        // per task
  bool need_grad;

  Partials(const Problem& problem, bool need_grad_)
      : stride(problem.groups * kGroupSamples),
        padded_d(problem.padded_d),
        inter(problem.ranges * stride, 0.0),
        dropped(problem.ranges * stride, 0.0),
        hardest(problem.ranges * stride, -2.0f),
        best(problem.ranges * stride, INT32_MIN),
        best_class(problem.ranges * stride, -1),
        touched(problem.ranges * stride, 0),
        grad(need_grad_ ? problem.ranges * problem.n * problem.padded_d : 0),
        class_sum(problem.ranges * problem.padded_d, 0.0f),
        work(problem.ranges * problem.groups),
        need_grad(need_grad_) {}

  RowSums sums(const Problem& problem, int64_t range, int64_t first) {
    const int64_t at = range * stride + first;
    float* partial = need_grad ? grad.data.get() + (range * problem.n + first) * padded_d : nullptr;
    return {&inter[at], &dropped[at], &hardest[at], &best[at], &best_class[at], partial, &touched[at]};
  }
};

struct Results {
  float *loss, *stats, *row_grad_x, *inv_norm, *target_weight;
  int32_t* arena;
  int64_t* segments;
  int64_t arena_words;
};

// Words of the arena that lie before this task: shares are proportional to the pairs, whole if N·C words fit.
int64_t arena_before(const Problem& p, int64_t group, int64_t first_class, int64_t words) {
  const double pairs = static_cast<double>(p.group_first(group)) * p.c +
                       static_cast<double>(p.group_count(group)) * std::min(first_class, p.c);
  return static_cast<int64_t>(pairs / (static_cast<double>(p.n) * p.c) * words);
}

void run_task(const Problem& problem, const Kernels& kernels, const Rules& rules, const Samples& samples, int64_t range,
              int64_t g, Partials& partials, Workspace& work, const Results& out) {
  const Group& group = samples.groups[g];
  const int64_t begin = problem.range_begin(range), end = problem.range_begin(range + 1);
  RowSums sums = partials.sums(problem, range, group.first);
  const int64_t arena_begin = arena_before(problem, g, begin * kBlockClasses, out.arena_words);
  Arena arena{out.segments != nullptr, out.arena + arena_begin, 0,
              arena_before(problem, g, end * kBlockClasses, out.arena_words) - arena_begin};
  const bool float_weight = problem.w.scalar_type() == at::kFloat;
  const int64_t task = range * problem.groups + g;
  std::vector<OwnClass> own;
  std::fill(work.class_sum.begin(), work.class_sum.end(), 0.0f);
  work.skip_screens = 0;  // what a task finds must not depend on the task before
  for (int64_t b = begin; b < end; ++b) {
    Block block{};
    block.first = b * kBlockClasses;
    block.rows = problem.block_rows(b);
    block.w = problem.rows(block.first, block.rows, work.converted, &block.row_stride);
    // the last block may be shorter than this one, and its prefetch must not run past the weight
    const bool whole_next = b + 1 < end && problem.block_rows(b + 1) == block.rows;
    block.next = float_weight && whole_next ? block.w + kBlockClasses * block.row_stride : nullptr;
    problem.own_classes(g, b, own);
    block.own = own.data();
    block.own_count = static_cast<int>(own.size());
    const int64_t used = arena.used;
    const int64_t record =
        kernels.forward_block(rules, group, block, static_cast<int>(problem.d), static_cast<int>(problem.padded_d),
                              g == 0, sums, arena, work, partials.work[task]);
    if (g == 0) std::memcpy(out.inv_norm + block.first, work.inv_norm.data(), sizeof(float) * block.rows);
    if (out.segments) {
      out.segments[(g * problem.blocks + b) * 2] = arena_begin + used;
      out.segments[(g * problem.blocks + b) * 2 + 1] = record;
    }
  }
  if (sums.grad) kernels.flush_dense_grad(group, static_cast<int>(problem.padded_d), sums, work);
  if (g == 0) std::copy(work.class_sum.begin(), work.class_sum.end(), &partials.class_sum[range * problem.padded_d]);
}

float clamp_cosine(float c) { return c < -1 ? -1 : c > 1 ? 1 : c; }

// Adds up one sample's partial sums, adds its own class, and completes (5) and (7).
void finish_row(const Problem& problem, const Kernels& kernels, const Rules& rules, const Samples& samples,
                const std::vector<float>& class_sum, bool weight_finite, int64_t i, Partials& partials,
                std::vector<float>& converted, std::vector<float>& grad, const Results& out) {
  const int64_t n = problem.n;
  const int d = static_cast<int>(problem.d);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  float* row_grad = out.row_grad_x ? out.row_grad_x + i * problem.d : nullptr;
  const auto report = [&](float loss, std::array<float, 6> stats, float target_weight) {
    out.loss[i] = loss;
    out.target_weight[i] = target_weight;
    for (int k = 0; k < 6; ++k) out.stats[k * n + i] = stats[k];
  };
  const int64_t code = problem.codes()[i];
  if (code == kIgnored) {
    if (row_grad) std::memset(row_grad, 0, sizeof(float) * d);
    return report(0, {0, 0, 0, 0, 0, 0}, 0);
  }
  if (!samples.usable(i) || !weight_finite || code == kInvalid) {
    if (row_grad) std::fill(row_grad, row_grad + d, nan);
    return report(nan, {nan, nan, nan, nan, nan, nan}, samples.usable(i) ? 0 : nan);
  }

  const float* x = samples.row(i);
  double inter = 0, dropped = 0;
  float hardest = -2;
  std::fill(grad.begin(), grad.end(), 0.0f);
  for (int64_t range = 0; range < problem.ranges; ++range) {
    RowSums sums = partials.sums(problem, range, i);
    inter += *sums.inter;
    dropped += *sums.dropped;
    hardest = std::max(hardest, *sums.hardest);
    if (row_grad && *sums.touched) kernels.axpy(1.0f, sums.grad, grad.data(), d);
  }
  const auto cosine = [&](int64_t cls, const float** w, float* inv) {
    int64_t stride;
    *w = problem.rows(cls, 1, converted, &stride);
    *inv = out.inv_norm[cls];
    return clamp_cosine(kernels.dot(x, *w, d) * *inv);
  };
  const float* w = nullptr;
  float inv = 0;
  // the largest screened product of the rest may beat what was computed in fp32, up to its rounding
  int64_t best_range = 0;
  for (int64_t range = 1; range < problem.ranges; ++range)
    if (*partials.sums(problem, range, i).best > *partials.sums(problem, best_range, i).best) best_range = range;
  const int64_t best_class = *partials.sums(problem, best_range, i).best_class;
  if (best_class >= 0) hardest = std::max(hardest, cosine(best_class, &w, &inv));

  float cos_target = 0, p = 0;
  if (code >= 0) {
    cos_target = cosine(code, &w, &inv);
    kernels.intra(rules.hyper, cos_target, &p);
    if (row_grad) kernels.axpy(-p * inv, w, grad.data(), d);
  }
  const float s = rules.hyper.s;
  if (row_grad) {
    const float norm = samples.norms[i];
    const float scale = s / std::max(norm, kNormEps);
    // below kNormEps normalize divides by a constant, so nothing is projected away
    const float along = norm < kNormEps ? 0.0f : kernels.dot(grad.data(), x, d);
    kernels.combine(scale, grad.data(), -along * scale, x, row_grad, d);
  }
  const float inter_loss = static_cast<float>(s * inter), intra_loss = -s * p * cos_target;
  const float cos_sum = kernels.dot(x, class_sum.data(), d) - cos_target;
  report(intra_loss + inter_loss,
         {intra_loss, inter_loss, cos_target, cos_sum, hardest < -1.5f ? -INFINITY : hardest,
          static_cast<float>(s * dropped)},
         -p);
}

}  // namespace

ForwardTensors native_forward(const at::Tensor& x, const at::Tensor& w, const at::Tensor& target, double s,
                              double k_intra, double k_inter, double a, double b, double filter_eps, bool need_grad_x,
                              bool need_grad_w, int64_t arena_words) {
  const Problem problem(x, w, target);
  const Kernels& kernels = sface::kernels();
  const Rules rules = make_rules(make_hyper(s, k_intra, k_inter, a, b, filter_eps), problem.d);
  const Samples samples(problem, kernels, {.columns = true, .pairs = rules.screen});

  const auto options = x.options();
  at::Tensor row_loss = at::empty({problem.n}, options), row_stats = at::empty({6, problem.n}, options);
  at::Tensor row_grad_x = at::empty({need_grad_x ? problem.n : 0, problem.d}, options);
  at::Tensor inv_norm = at::empty({problem.c}, options), target_weight = at::empty({problem.n}, options);
  at::Tensor arena = at::empty({need_grad_w ? arena_words : 0}, options.dtype(at::kInt));
  at::Tensor segments = at::empty({need_grad_w ? problem.groups : 0, problem.blocks, 2}, options.dtype(at::kLong));
  const Results out{row_loss.mutable_data_ptr<float>(),
                    row_stats.mutable_data_ptr<float>(),
                    need_grad_x ? row_grad_x.mutable_data_ptr<float>() : nullptr,
                    inv_norm.mutable_data_ptr<float>(),
                    target_weight.mutable_data_ptr<float>(),
                    need_grad_w ? arena.mutable_data_ptr<int32_t>() : nullptr,
                    need_grad_w ? segments.mutable_data_ptr<int64_t>() : nullptr,
                    need_grad_w ? arena_words : 0};

  Partials partials(problem, need_grad_x);
  const int64_t tasks = problem.ranges * problem.groups;
  if (problem.n == 0) inv_norm.zero_();
  for_each_worker(tasks, [&](auto next_task) {
    Workspace work = make_workspace(problem, kernels);
    for (int64_t task; (task = next_task()) < tasks;)
      run_task(problem, kernels, rules, samples, task / problem.groups, task % problem.groups, partials, work, out);
  });

  std::vector<float> class_sum(problem.padded_d, 0.0f);
  for (int64_t range = 0; range < problem.ranges; ++range)
    kernels.axpy(1.0f, &partials.class_sum[range * problem.padded_d], class_sum.data(),
                 static_cast<int>(problem.padded_d));
  bool weight_finite = true;
  if (problem.n > 0)
    for (int64_t j = 0; j < problem.c; ++j) weight_finite &= !std::isnan(out.inv_norm[j]);
  at::parallel_for(0, problem.n, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> converted, grad(problem.padded_d);
    for (int64_t i = begin; i < end; ++i)
      finish_row(problem, kernels, rules, samples, class_sum, weight_finite, i, partials, converted, grad, out);
  });

  at::Tensor counts = at::zeros({2}, options.dtype(at::kLong));
  int64_t* totals = counts.mutable_data_ptr<int64_t>();
  for (int64_t task = 0; task < tasks; ++task) {
    totals[0] += partials.work[task].active;
    totals[1] += partials.work[task].dense_pairs;
  }
  return {row_loss, row_stats, counts, row_grad_x, inv_norm, target_weight, arena, segments};
}

}  // namespace sface
