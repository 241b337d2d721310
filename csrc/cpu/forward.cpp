// The forward on a CPU: row losses, statistics, ∂l_i/∂x_i, and what the backward needs for ∂w.
//
// Never materialises N×C; reads w from memory once, and again only the rows of each sample's own class and the nearest
// others. A task is a range of classes and a group of samples; it owns its partial sums, which are added in a fixed
// order.

#include "early_rows.h"
#include "ops.h"
#include "partials.h"
#include "problem.h"

namespace sface {

namespace {

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype = ScalarType::Float) {
  return torch::stable::empty(sizes, dtype);
}

// The operator's outputs; null where one was not asked for.
struct Results {
  float *loss, *stats, *row_grad_x, *inv_norm, *target_weight;
  int64_t* hardest_class;
  int32_t* arena;
  Segment* segments;  // [groups][blocks]
  int64_t arena_words;
};

// Words of the arena that lie before this task: shares are proportional to the pairs, whole if N·C words fit.
int64_t arena_before(const Problem& p, int64_t group, int64_t first_class, int64_t words) {
  const int64_t pairs = p.group_first(group) * p.c + p.group_count(group) * std::min(first_class, p.c);
  return static_cast<int64_t>(static_cast<__int128>(pairs) * words / (p.n * p.c));
}

// Task range·groups + group. `early`: where rows of ∂w are made, or null.
void run_task(const Call& call, int64_t task_index, Partials& partials, Workspace& work, const Results& out,
              const EarlyRows* early) {
  const Problem& problem = call.problem;
  const int64_t range = task_index / problem.groups, g = task_index % problem.groups;
  // the range that this thread has next, if all threads keep step
  const int64_t next_range = (task_index + torch::stable::get_num_threads()) / problem.groups;
  const Group& group = call.samples.groups[g];
  const int64_t begin = problem.range_begin(range), end = problem.range_begin(range + 1);
  const int64_t arena_begin = arena_before(problem, g, begin * kBlockClasses, out.arena_words);
  const int64_t arena_end = arena_before(problem, g, end * kBlockClasses, out.arena_words);
  const bool first_group = g == 0;  // what belongs to classes alone is its task's to write
  Task task{.sums = partials.sums(range, group.first),
            .arena = {out.segments != nullptr, out.arena + arena_begin, 0, arena_end - arena_begin},
            .tally = {}};
  SampleGrads::Part grads{};
  if (partials.grads) {
    grads = partials.grads->take(range, g);
    task.sums.grad = grads.rows;
    task.sums.touched = grads.touched;
  }
  std::vector<OwnClass> own;
  bool all_finite = true;
  std::fill(work.class_sum.begin(), work.class_sum.end(), 0.0f);
  work.skip_screens = work.skip_int8 = 0;  // what a task finds must not depend on the task before
  for (int64_t b = begin; b < end; ++b) {
    Block block = problem.block_of(g, b, own);
    block.w = problem.weight_rows(block.first, block.count, work.converted, &block.row_stride);
    block.sum_rows = first_group;
    const int64_t next = b + 1 < end ? b + 1 : problem.range_begin(std::min(next_range, problem.ranges));
    // the last block may be shorter than this one, and its prefetch must not run past the weight, nor take what lies
    // between rows far apart
    const bool whole_next =
        next < problem.blocks && problem.block_rows(next) == block.count && block.row_stride < 2 * problem.d;
    if (problem.float_weight() && whole_next) block.next = block.w + (next - b) * kBlockClasses * block.row_stride;
    const int64_t used = task.arena.used;
    const int64_t count = call.kernels.forward_block(call.rules, group, block, task, work);
    if (first_group)
      for (int r = 0; r < block.count; ++r) {
        out.inv_norm[block.first + r] = work.shortened >> r & 1 ? -work.inv_norm[r] : work.inv_norm[r];
        all_finite &= !is_nan(work.inv_norm[r]);
      }
    if (out.segments) out.segments[g * problem.blocks + b] = {arena_begin + used, count};
    if (early) early->make(block, task.arena.words + used, count, work);
  }
  if (partials.grads) {
    call.kernels.flush_dense_grad(group, task.sums, work);
    partials.grads->give(range, g, grads);
  }
  if (early) call.kernels.finish_stores();
  if (first_group) {
    std::copy_n(work.class_sum.begin(), problem.padded_d, &partials.class_sum[range * problem.padded_d]);
    partials.classes_finite[range] = all_finite;
  }
  partials.tallies[range * problem.groups + g] = task.tally;
}

// What all rows need to know of the classes.
struct ClassTotals {
  std::vector<float> sum;  // [padded D] Σ ŵ_j
  bool finite = true;      // whether every row of w is

  ClassTotals(const Call& call, const Partials& partials) : sum(call.problem.padded_d, 0.0f) {
    const Problem& p = call.problem;
    for (int64_t range = 0; range < p.ranges; ++range) {
      call.kernels.axpy(1.0f, &partials.class_sum[range * p.padded_d], sum.data(), static_cast<int>(p.padded_d));
      finite &= partials.classes_finite[range];
    }
  }
};

// Completes (5) and (7) sample by sample.
class RowFinisher {
 public:
  RowFinisher(const Call& call, Partials& partials, const ClassTotals& classes, const Results& out)
      : call_(call), partials_(partials), classes_(classes), out_(out), grad_(call.problem.padded_d) {}

  void finish(int64_t i) {
    const int64_t code = call_.problem.codes()[i];
    if (code == kIgnored) return report_constant(i, 0, 0);
    if (!call_.samples.usable(i)) return report_constant(i, kNaN, kNaN);

    const int d = static_cast<int>(call_.problem.d);
    const float* x = call_.samples.row(i);
    WeightRow own{};
    float cos_target = 0, p = 0;
    if (code >= 0 && !is_nan(out_.inv_norm[code])) {
      own = weight_row(code, own_converted_);
      cos_target = cosine(x, own);
      call_.kernels.intra(call_.rules.hyper, cos_target, &p);
    }
    // a row of w that is not finite leaves ∂w of the others as it is: −p even where the loss is NaN
    if (!classes_.finite || code == kInvalid) return report_constant(i, kNaN, -p);

    float* row_grad = out_.row_grad_x ? out_.row_grad_x + i * d : nullptr;
    Totals totals = add_partials(i);
    const float s = call_.rules.hyper.s;
    // again as the own class's: screens and products add up in other orders, and a copy of the own centre must tie
    if (totals.hardest_class >= 0) totals.hardest = cosine(x, weight_row(totals.hardest_class, converted_));
    // the largest screened product below the threshold may beat what was computed in fp32, up to its rounding
    if (totals.best_class >= 0) totals.take(cosine(x, weight_row(totals.best_class, converted_)), totals.best_class);
    if (row_grad) {
      if (const float* sum = partials_.grads->finish(i)) {
        std::copy_n(sum, d, grad_.begin());
      } else {
        std::fill(grad_.begin(), grad_.end(), 0.0f);
      }
      if (code >= 0) call_.kernels.axpy(-p * own.inv_norm, own.w, grad_.data(), d);
      const double norm = call_.samples.norms[i];
      const float scale = static_cast<float>(s / std::max<double>(norm, kNormEps));
      // below kNormEps normalize divides by a constant, so nothing is projected away
      const float along = norm < kNormEps ? 0.0f : call_.kernels.dot(grad_.data(), x, d);
      call_.kernels.combine(scale, grad_.data(), -along * scale, x, row_grad, d);
    }
    const float inter_loss = static_cast<float>(s * totals.inter), intra_loss = -s * p * cos_target;
    const float cos_sum = call_.kernels.dot(x, classes_.sum.data(), d) - cos_target;
    report(i, intra_loss + inter_loss,
           {intra_loss, inter_loss, cos_target, cos_sum, totals.hardest < -1.5f ? -INFINITY : totals.hardest,
            static_cast<float>(s * totals.dropped)},
           totals.hardest_class, -p);
  }

 private:
  static constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

  struct Totals {
    double inter = 0, dropped = 0;
    float hardest = -2;
    int32_t hardest_class = -1;
    int32_t best = INT32_MIN, best_class = -1;

    // The lowest class of equal cosines.
    void take(float cosine, int32_t cls) {
      if (cosine < hardest || (cosine == hardest && cls > hardest_class)) return;
      hardest = cosine;
      hardest_class = cls;
    }
  };

  // The sample's partial sums, range by range in their order.
  Totals add_partials(int64_t i) {
    Totals totals;
    for (int64_t range = 0; range < call_.problem.ranges; ++range) {
      const RowSums sums = partials_.sums(range, i);
      totals.inter += *sums.inter;
      totals.dropped += *sums.dropped;
      if (*sums.hardest_class >= 0) totals.take(*sums.hardest, *sums.hardest_class);
      if (*sums.best > totals.best) {
        totals.best = *sums.best;
        totals.best_class = *sums.best_class;
      }
    }
    return totals;
  }

  WeightRow weight_row(int64_t cls, std::vector<float>& converted) const {
    return call_.problem.weight_row(cls, out_.inv_norm[cls], converted);
  }

  float cosine(const float* x, const WeightRow& row) const {
    return clamp_cosine(call_.kernels.dot(x, row.w, static_cast<int>(call_.problem.d)) * row.inv_norm);
  }

  // `stats` in the order of RowStats in sface_kernels/types.py.
  void report(int64_t i, float loss, const std::array<float, 6>& stats, int64_t hardest_class, float target_weight) {
    out_.loss[i] = loss;
    out_.hardest_class[i] = hardest_class;
    out_.target_weight[i] = target_weight;
    for (int k = 0; k < 6; ++k) out_.stats[k * call_.problem.n + i] = stats[k];
  }

  // A row that is ignored (zeros) or has no value (NaN).
  void report_constant(int64_t i, float value, float target_weight) {
    const int64_t d = call_.problem.d;
    if (out_.row_grad_x) std::fill_n(out_.row_grad_x + i * d, d, value);
    report(i, value, {value, value, value, value, value, value}, -1, target_weight);
  }

  const Call& call_;
  Partials& partials_;
  const ClassTotals& classes_;
  const Results& out_;
  std::vector<float> grad_;                       // [padded D] Σ g ŵ of the sample
  std::vector<float> converted_, own_converted_;  // rows of w that are not taken in place
};

// −p_i / s of the samples whose class is here, before any block is computed.
std::vector<float> target_weights(const Call& call) {
  const auto& [problem, kernels, rules, samples] = call;
  std::vector<float> weights(problem.n, 0.0f), converted;
  const int d = static_cast<int>(problem.d);
  for (const Labelled& own : problem.labelled) {
    int64_t stride;
    const float* w = problem.weight_rows(own.cls, 1, converted, &stride);
    const float norm = std::sqrt(kernels.dot(w, w, d));
    float p = 0;  // where the cosine is not this product
    if (norm > kNormEps && is_finite(norm))
      kernels.intra(rules.hyper, clamp_cosine(kernels.dot(samples.row(own.sample), w, d) / norm), &p);
    weights[own.sample] = -p;
  }
  return weights;
}

// Where rows of ∂w are to be made, and for which upstream gradient.
struct EarlyGrad {
  const Tensor &grad, &rows;
  double upstream;
  bool mean;
};

ForwardTensors forward(const Tensor& x, const Tensor& w, const Tensor& target, const Hyper& hyper, bool need_grad_x,
                       bool need_grad_w, int64_t arena_words, const EarlyGrad* early_grad) {
  const Problem problem(x, w, target);
  check(arena_words >= 0, "arena_words: expected a size, got ", arena_words);
  const Kernels& kernels = sface::kernels();
  Rules rules = make_rules(hyper, problem.d, {});
  const Samples samples(problem, kernels, layouts_of(hyper, problem.d, kernels));
  const Call call{problem, kernels, rules, samples};
  if (!rules.screen && kernels.parts_bytes(problem.padded_d) > 0)
    rules = make_rules(hyper, problem.d, own_shares(problem, kernels, samples, target_weights(call).data()));
  std::optional<EarlyRows> early;
  if (early_grad) early.emplace(call, early_grad->grad, early_grad->rows, early_grad->upstream, early_grad->mean);

  const int64_t words = need_grad_w ? std::min(arena_words, problem.n * problem.c) : 0;
  const int64_t records = need_grad_w ? problem.groups * problem.blocks : 0;
  Tensor row_loss = empty({problem.n}), row_stats = empty({6, problem.n});
  Tensor hardest_class = empty({problem.n}, ScalarType::Long);
  Tensor row_grad_x = empty({need_grad_x ? problem.n : 0, problem.d});
  Tensor inv_norm = empty({problem.c}), target_weight = empty({problem.n});
  Tensor arena = empty({words}, ScalarType::Int);
  if (!rules.screen || rules.far) arena = empty_kept(arena);  // most of it will be written
  Tensor segments = empty({2 * records}, ScalarType::Long);
  const Results out{
      .loss = row_loss.mutable_data_ptr<float>(),
      .stats = row_stats.mutable_data_ptr<float>(),
      .row_grad_x = need_grad_x ? row_grad_x.mutable_data_ptr<float>() : nullptr,
      .inv_norm = inv_norm.mutable_data_ptr<float>(),
      .target_weight = target_weight.mutable_data_ptr<float>(),
      .hardest_class = hardest_class.mutable_data_ptr<int64_t>(),
      .arena = need_grad_w ? arena.mutable_data_ptr<int32_t>() : nullptr,
      .segments = need_grad_w ? reinterpret_cast<Segment*>(segments.mutable_data_ptr<int64_t>()) : nullptr,
      .arena_words = words};

  Partials partials(problem, kernels, need_grad_x);
  const int64_t tasks = problem.ranges * problem.groups;
  if (problem.n == 0) std::fill_n(out.inv_norm, problem.c, 0.0f);
  for_each_worker(tasks, [&](auto next_task) {
    Workspace work = make_workspace(problem, kernels);
    for (int64_t task; (task = next_task()) < tasks;)
      run_task(call, task, partials, work, out, early ? &*early : nullptr);
  });

  const ClassTotals classes(call, partials);
  parallel_for(problem.n, 1, [&](int64_t begin, int64_t end) {
    RowFinisher rows(call, partials, classes, out);
    for (int64_t i = begin; i < end; ++i) rows.finish(i);
    kernels.finish_stores();
  });

  Tensor counts = empty({2}, ScalarType::Long), counted = empty({}, ScalarType::Long);
  int64_t* totals = counts.mutable_data_ptr<int64_t>();
  totals[0] = totals[1] = 0;
  *counted.mutable_data_ptr<int64_t>() = problem.counted();
  for (const Tally& tally : partials.tallies) {
    totals[0] += tally.active;
    totals[1] += tally.dense_pairs;
  }
  return {row_loss, row_stats, hardest_class, counts, row_grad_x, inv_norm, target_weight, arena, segments, counted};
}

}  // namespace

ForwardTensors native_forward(const Tensor& x, const Tensor& w, const Tensor& target, double s, double k_intra,
                              double k_inter, double a, double b, double filter_eps, bool need_grad_x, bool need_grad_w,
                              int64_t arena_words) {
  const Hyper hyper = make_hyper(s, k_intra, k_inter, a, b, filter_eps);
  return forward(x, w, target, hyper, need_grad_x, need_grad_w, arena_words, nullptr);
}

ForwardTensors native_forward_early(const Tensor& x, const Tensor& w, const Tensor& target, double s, double k_intra,
                                    double k_inter, double a, double b, double filter_eps, bool need_grad_x,
                                    int64_t arena_words, double upstream, bool mean, const Tensor& grad_w,
                                    const Tensor& rows) {
  const EarlyGrad early{grad_w, rows, upstream, mean};
  const Hyper hyper = make_hyper(s, k_intra, k_inter, a, b, filter_eps);
  return forward(x, w, target, hyper, need_grad_x, true, arena_words, &early);
}

}  // namespace sface
