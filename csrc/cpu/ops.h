// The operators of this folder, as module.cpp registers them. Schemas: sface_kernels/ops.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace sface {

using ForwardTensors =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ForwardTensors native_forward(const at::Tensor& x, const at::Tensor& w, const at::Tensor& target, double s,
                              double k_intra, double k_inter, double a, double b, double filter_eps, bool need_grad_x,
                              bool need_grad_w, int64_t arena_words);

at::Tensor native_grad_weight(const at::Tensor& x, const at::Tensor& w, const at::Tensor& target,
                              const at::Tensor& grad_row, double s, double k_intra, double k_inter, double a, double b,
                              double filter_eps, const at::Tensor& inv_norm, const at::Tensor& target_weight,
                              const at::Tensor& arena, const at::Tensor& segments);

// Uninitialised [C, D] for a gradient. Its memory is kept for the next one when it is freed.
at::Tensor empty_gradient(int64_t rows, int64_t columns, at::ScalarType dtype);
// Gives the kept memory back to the system.
void release_memory();

inline Hyper make_hyper(double s, double k_intra, double k_inter, double a, double b, double filter_eps) {
  return {static_cast<float>(s), static_cast<float>(k_intra), static_cast<float>(k_inter),
          static_cast<float>(a), static_cast<float>(b),       static_cast<float>(filter_eps)};
}

}  // namespace sface
