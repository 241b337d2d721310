// An optimizer's step on the class centres, from the lists that forwards left instead of ∂w.
//
// Reads and writes each row of w and of the optimizer's state once; ∂w is never made, only the sums of one block of
// classes. A task is a range of class blocks, and no two tasks write the same row. Every backward since the last step
// adds to a block's sums before its rows move, so all of them see the w of their forward.
#include <deque>
#include <optional>

#include "class_sums.h"

namespace sface {

namespace {

// Seven tensors for each backward, and the six numbers of its Hyper.
std::deque<SavedPairs> read_backwards(const Tensor& w, const std::vector<Tensor>& saved,
                                      const std::vector<double>& hyper) {
  check(saved.size() % 7 == 0 && saved.size() / 7 * 6 == hyper.size(),
        "saved, hyper: expected 7 tensors and 6 numbers for each backward, got ", saved.size(), " and ", hyper.size());
  std::deque<SavedPairs> backwards;
  for (size_t i = 0; i < saved.size() / 7; ++i) {
    const Tensor* t = &saved[7 * i];
    const double* h = &hyper[6 * i];
    const Hyper of_this = make_hyper(h[0], h[1], h[2], h[3], h[4], h[5]);
    backwards.emplace_back(t[0], w, t[1], t[2], of_this, t[3], t[4], t[5], t[6], of_this.s);
  }
  return backwards;
}

float* float_rows(const char* name, const Tensor& t, int64_t c, int64_t d) {
  check_tensor(name, t, ScalarType::Float, {c, d});
  return static_cast<float*>(t.mutable_data_ptr());
}

// Calls move(first element of the row, its gradient) for every row of w; without a gradient scale and along are 0.
// `sign` is −1 to climb.
template <typename Move>
void for_each_row(const Tensor& w, const std::deque<SavedPairs>& backwards, float sign, const Move& move) {
  const int64_t c = w.size(0), d = w.size(1), blocks = ceil_div(c, kBlockClasses);
  const bool poisoned =
      std::any_of(backwards.begin(), backwards.end(), [](const SavedPairs& one) { return one.up.poisoned; });
  // from where the forward ended, whose rows are in the caches still, to where the next one begins
  for_each_block(blocks, Order::kBackwards, [&](auto next_block) {
    std::vector<float> zeros(d), special(d);
    std::optional<Workspace> work;
    std::optional<RawRows> rows;
    std::vector<BlockSums> sums;
    if (!backwards.empty()) {
      const SavedPairs& any = backwards.front();
      work = make_workspace(any.problem, any.kernels);
      rows.emplace(*work, any.problem.padded_d);
      for (const SavedPairs& one : backwards) sums.emplace_back(one, *work, *rows);
    }
    for (int64_t b; (b = next_block()) < blocks;) {
      if (rows) rows->begin();
      for (BlockSums& one : sums) one.add_block(b);
      for (int64_t cls = b * kBlockClasses; cls < std::min(c, (b + 1) * kBlockClasses); ++cls) {
        float* raw = rows ? rows->row(static_cast<int>(cls - b * kBlockClasses)) : nullptr;
        StepGradient gradient{zeros.data(), 0, 0};
        const float inv = backwards.empty() ? 0 : backwards.front().inv_norm[cls];
        if (poisoned) {
          gradient = {zeros.data(), std::numeric_limits<float>::quiet_NaN(), 0};
        } else if (is_nan(inv) || (raw && inv < 0)) {
          write_row(backwards.front(), raw, cls, 1, work->converted, special.data());
          gradient = {special.data(), sign, 0};
        } else if (raw) {
          const RowGradient row = row_gradient(backwards.front(), raw, cls, 1, work->converted);
          gradient = {raw, sign * row.scale, sign * row.along};
        }
        move(cls, gradient);
      }
    }
  });
}

}  // namespace

void native_sgd_step(const Tensor& w, const std::optional<Tensor>& momentum_buffer, const std::vector<Tensor>& saved,
                     const std::vector<double>& hyper, double lr, double momentum, double dampening,
                     double weight_decay, bool nesterov, bool maximize) {
  const int64_t c = w.size(0), d = w.size(1);
  float* rows = float_rows("w", w, c, d);
  float* buffer = momentum_buffer ? float_rows("momentum_buffer", *momentum_buffer, c, d) : nullptr;
  const std::deque<SavedPairs> backwards = read_backwards(w, saved, hyper);
  const SgdRule rule{.lr = static_cast<float>(lr),
                     .momentum = static_cast<float>(momentum),
                     .undamped = static_cast<float>(1 - dampening),
                     .weight_decay = static_cast<float>(weight_decay),
                     .nesterov = nesterov};
  const Kernels& kernels = sface::kernels();
  const bool moves_all = buffer || weight_decay != 0;
  for_each_row(w, backwards, maximize ? -1 : 1, [&](int64_t cls, const StepGradient& gradient) {
    if (moves_all || gradient.scale != 0)
      kernels.sgd(rule, gradient, rows + cls * d, buffer ? buffer + cls * d : nullptr, static_cast<int>(d));
  });
}

void native_adamw_step(const Tensor& w, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                       const std::vector<Tensor>& saved, const std::vector<double>& hyper, double lr, double beta1,
                       double beta2, double eps, double weight_decay, double step, bool maximize) {
  const int64_t c = w.size(0), d = w.size(1);
  float* rows = float_rows("w", w, c, d);
  float *mean = float_rows("exp_avg", exp_avg, c, d), *square = float_rows("exp_avg_sq", exp_avg_sq, c, d);
  const std::deque<SavedPairs> backwards = read_backwards(w, saved, hyper);
  const AdamWRule rule{.keep = static_cast<float>(1 - lr * weight_decay),
                       .new_mean = static_cast<float>(1 - beta1),
                       .old_square = static_cast<float>(beta2),
                       .new_square = static_cast<float>(1 - beta2),
                       .step_size = static_cast<float>(lr / (1 - std::pow(beta1, step))),
                       .unbias_root = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step))),
                       .eps = static_cast<float>(eps)};
  const Kernels& kernels = sface::kernels();
  for_each_row(w, backwards, maximize ? -1 : 1, [&](int64_t cls, const StepGradient& gradient) {
    kernels.adamw(rule, gradient, rows + cls * d, mean + cls * d, square + cls * d, static_cast<int>(d));
  });
}

}  // namespace sface
