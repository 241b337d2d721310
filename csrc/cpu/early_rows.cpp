#include "early_rows.h"

#include "class_sums.h"

namespace sface {

EarlyRows::EarlyRows(const Call& call, const Tensor& grad, const Tensor& rows, double upstream, bool mean)
    : call_(call), u_(static_cast<float>(upstream)) {
  const Problem& p = call.problem;
  check(p.float_weight() && p.groups <= 1, "w, x: expected a float32 weight and at most ", kGroupSamples, " samples");
  check_tensor("grad_w", grad, ScalarType::Float, {p.c, p.d});
  check_tensor("rows", rows, ScalarType::Byte, {p.c});
  grad_ = static_cast<float*>(grad.mutable_data_ptr());
  rows_ = static_cast<Early*>(rows.mutable_data_ptr());
  std::fill_n(rows_, p.c, Early::kLater);
  if (mean) u_ /= static_cast<float>(p.counted());
  expected_ = is_finite(u_);  // else, and with a sample that is not finite, all of ∂w is NaN
  for (int64_t i = 0; i < p.n; ++i) expected_ &= p.ignored(i) || call.samples.usable(i);
}

void EarlyRows::make(const Block& block, const int32_t* words, int64_t count, Workspace& work) const {
  if (!expected_ || count < 0 || work.shortened != 0) return;
  for (int r = 0; r < block.count; ++r)
    if (!is_finite(work.inv_norm[r])) return;
  const Kernels& kernels = call_.kernels;
  const int d = static_cast<int>(call_.problem.d), padded_d = static_cast<int>(call_.problem.padded_d);
  float* const raw = work.raw.data();  // Σ u g x̂ of one class after the other, so that it stays in the L1 cache
  const int32_t* const end = words + 2 * count;
  const OwnClass *own = block.own, *const own_end = own + block.own_count;
  for (int r = 0; r < block.count; ++r) {
    const WeightRow row{block.w + r * block.row_stride, work.inv_norm[r], 1};
    Run run;
    bool first = true;
    const auto finish = [&] {
      if (run.count == 0) return;
      kernels.add_rows(run.count, run.scale, run.x, first, raw, padded_d);
      first = false;
      run.count = 0;
    };
    const auto add = [&](float scale, int sample) {
      run.scale[run.count] = scale;
      run.x[run.count++] = call_.samples.row(sample);
      if (run.count == Run::kMost) finish();
    };
    for (; words < end && words[0] >> 16 == r; words += 2) {
      float weight;
      std::memcpy(&weight, words + 1, sizeof(weight));
      add(u_ * weight, words[0] & 0xffff);
    }
    for (; own < own_end && own->row == r; ++own) {
      float p;
      kernels.intra(call_.rules.hyper,
                    clamp_cosine(kernels.dot(call_.samples.row(own->sample), row.w, d) * row.inv_norm), &p);
      add(u_ * -p, own->sample);
    }
    finish();
    rows_[block.first + r] = first ? Early::kZeros : Early::kMade;
    if (first) continue;
    const RowGradient gradient = row_gradient(kernels, raw, row, d, call_.rules.hyper.s);
    kernels.combine(gradient.scale, raw, gradient.along, row.w, grad_ + (block.first + r) * d, d);
  }
}

}  // namespace sface
