// ∂w on a CPU, equation (8), from the list of active pairs that the forward left.
//
// Writes each row of ∂w once; reads only the rows of w that have a gradient. A task is a range of class blocks, and no
// two tasks write the same row.
#include "class_sums.h"
#include "early_rows.h"

namespace sface {

namespace {

// The rows of ∂w of one block from their sums, in the dtype of the weight.
template <typename T>
void write_block(const SavedPairs& saved, int64_t b, RawRows& sums, Workspace& work, std::vector<float>& row, T* grad) {
  const int64_t d = saved.problem.d;
  const float s = saved.rules.hyper.s;
  for (int r = 0; r < saved.problem.block_rows(b); ++r) {
    const int64_t cls = b * kBlockClasses + r;
    T* out = grad + cls * d;
    if constexpr (std::is_same_v<T, float>) {
      write_row(saved, sums.row(r), cls, s, work.converted, out);
    } else {
      write_row(saved, sums.row(r), cls, s, work.converted, row.data());
      for (int64_t k = 0; k < d; ++k) out[k] = static_cast<T>(row[k]);
    }
  }
}

// All rows of ∂w, or of blocks that begin with Early::kLater all and of the others the zeros.
void write_grad(const SavedPairs& saved, const Tensor& grad, const Early* early) {
  const Problem& problem = saved.problem;
  void* const out = grad.mutable_data_ptr();
  for_each_block(problem.blocks, Order::kForwards, [&](auto next_block) {
    Workspace work = make_workspace(problem, saved.kernels);
    RawRows rows(work, problem.padded_d);
    BlockSums sums(saved, work, rows);
    std::vector<float> row(problem.d);
    for (int64_t b; (b = next_block()) < problem.blocks;) {
      const int64_t first = b * kBlockClasses;
      if (early && early[first] != Early::kLater) {
        for (int64_t cls = first; cls < first + problem.block_rows(b); ++cls)
          if (early[cls] == Early::kZeros)
            saved.kernels.zero(static_cast<float*>(out) + cls * problem.d, static_cast<int>(problem.d));
        continue;
      }
      rows.begin();
      sums.add_block(b);
      if (problem.float_weight()) {
        write_block(saved, b, rows, work, row, static_cast<float*>(out));
      } else if (problem.weight_type == ScalarType::Half) {
        write_block(saved, b, rows, work, row, static_cast<Half*>(out));
      } else {
        write_block(saved, b, rows, work, row, static_cast<BFloat16*>(out));
      }
    }
    saved.kernels.finish_stores();
  });
}

}  // namespace

Tensor native_grad_weight(const Tensor& x, const Tensor& w, const Tensor& target, const Tensor& grad_row, double s,
                          double k_intra, double k_inter, double a, double b, double filter_eps, const Tensor& inv_norm,
                          const Tensor& target_weight, const Tensor& arena, const Tensor& segments) {
  const SavedPairs saved(x, w, target, grad_row, make_hyper(s, k_intra, k_inter, a, b, filter_eps), inv_norm,
                         target_weight, arena, segments, 1);
  Tensor grad = empty_kept(w);
  if (saved.up.poisoned) return torch::stable::fill_(grad, std::numeric_limits<double>::quiet_NaN());
  write_grad(saved, grad, nullptr);
  return grad;
}

void native_grad_weight_rest(const Tensor& x, const Tensor& w, const Tensor& target, const Tensor& grad_row, double s,
                             double k_intra, double k_inter, double a, double b, double filter_eps,
                             const Tensor& inv_norm, const Tensor& target_weight, const Tensor& arena,
                             const Tensor& segments, const Tensor& grad_w, const Tensor& rows) {
  const SavedPairs saved(x, w, target, grad_row, make_hyper(s, k_intra, k_inter, a, b, filter_eps), inv_norm,
                         target_weight, arena, segments, 1);
  const Problem& problem = saved.problem;
  check_tensor("grad_w", grad_w, problem.weight_type, {problem.c, problem.d});
  check_tensor("rows", rows, ScalarType::Byte, {problem.c});
  if (saved.up.poisoned) {
    Tensor grad = grad_w;
    torch::stable::fill_(grad, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  write_grad(saved, grad_w, static_cast<const Early*>(rows.const_data_ptr()));
}

}  // namespace sface
