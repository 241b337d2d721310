// The operators of this folder, as module.cpp registers them. Schemas: sface_kernels/ops.py.
//
// Of PyTorch only its stable ABI is used, so that one build serves every later version of it and every Python.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace sface {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// RuntimeError with these parts as its text.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (__builtin_expect(!condition, 0)) fail(parts...);
}

using ForwardTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Labels [N] of any integer type as codes for a weight that holds the classes [first, first + count) of num_classes,
// and the first row whose label is out of range, or -1.
std::tuple<Tensor, int64_t> native_labels(const Tensor& labels, int64_t num_classes, int64_t ignore_index,
                                          int64_t first, int64_t count);

ForwardTensors native_forward(const Tensor& x, const Tensor& w, const Tensor& target, double s, double k_intra,
                              double k_inter, double a, double b, double filter_eps, bool need_grad_x, bool need_grad_w,
                              int64_t arena_words);

// The same for a float32 weight and at most kGroupSamples samples; and rows of ∂w [C, D] of their losses' mean or sum,
// for that upstream gradient, with what has become of each in `rows` [C] (Early in early_rows.h).
ForwardTensors native_forward_early(const Tensor& x, const Tensor& w, const Tensor& target, double s, double k_intra,
                                    double k_inter, double a, double b, double filter_eps, bool need_grad_x,
                                    int64_t arena_words, double upstream, bool mean, const Tensor& grad_w,
                                    const Tensor& rows);

Tensor native_grad_weight(const Tensor& x, const Tensor& w, const Tensor& target, const Tensor& grad_row, double s,
                          double k_intra, double k_inter, double a, double b, double filter_eps, const Tensor& inv_norm,
                          const Tensor& target_weight, const Tensor& arena, const Tensor& segments);

// The rows that native_forward_early left.
void native_grad_weight_rest(const Tensor& x, const Tensor& w, const Tensor& target, const Tensor& grad_row, double s,
                             double k_intra, double k_inter, double a, double b, double filter_eps,
                             const Tensor& inv_norm, const Tensor& target_weight, const Tensor& arena,
                             const Tensor& segments, const Tensor& grad_w, const Tensor& rows);

// Seven tensors in `saved` and six numbers in `hyper` for each backward since the last step, none of them or more:
// x, target, grad_row, inv_norm, target_weight, arena, segments, and native_forward's s … filter_eps.
void native_sgd_step(const Tensor& w, const std::optional<Tensor>& momentum_buffer, const std::vector<Tensor>& saved,
                     const std::vector<double>& hyper, double lr, double momentum, double dampening,
                     double weight_decay, bool nesterov, bool maximize);

void native_adamw_step(const Tensor& w, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                       const std::vector<Tensor>& saved, const std::vector<double>& hyper, double lr, double beta1,
                       double beta2, double eps, double weight_decay, double step, bool maximize);

// Uninitialised, of the shape and dtype of `like`, contiguous; a large one in the memory of an earlier one, where there
// is some that nobody holds any more.
Tensor empty_kept(const Tensor& like);

// The huge pages that lie inside: they fault 512 times less often. Costs nothing where they are huge already.
void use_huge_pages(void* data, size_t bytes);

inline Hyper make_hyper(double s, double k_intra, double k_inter, double a, double b, double filter_eps) {
  return {static_cast<float>(s), static_cast<float>(k_intra), static_cast<float>(k_inter),
          static_cast<float>(a), static_cast<float>(b),       static_cast<float>(filter_eps)};
}

}  // namespace sface
