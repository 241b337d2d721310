// Labels as the codes that the kernels take.
#include <torch/csrc/stable/ops.h>

#include "ops.h"

namespace sface {

namespace {

// Codes of `out` [N], and the first row whose label is out of range, or −1.
template <typename T>
int64_t to_codes(const T* labels, int64_t n, int64_t classes, int64_t ignored, int64_t first, int64_t count,
                 int64_t* out) {
  int64_t off = -1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t label = labels[i];
    if (label == ignored) {
      out[i] = kIgnored;
    } else if (label < 0 || label >= classes) {
      out[i] = kInvalid;
      if (off < 0) off = i;
    } else {
      out[i] = label >= first && label < first + count ? label - first : kNoTarget;
    }
  }
  return off;
}

}  // namespace

std::tuple<Tensor, int64_t> native_labels(const Tensor& labels, int64_t num_classes, int64_t ignore_index,
                                          int64_t first, int64_t count) {
  if (!(labels.is_cpu() && labels.dim() == 1 && labels.is_contiguous()))
    fail("labels: expected one contiguous dimension on the CPU, got ", labels.dim(), " dimensions");
  Tensor target = torch::stable::empty({labels.numel()}, ScalarType::Long);
  const auto codes = [&](const auto* data) {
    return to_codes(data, labels.numel(), num_classes, ignore_index, first, count, target.mutable_data_ptr<int64_t>());
  };
  switch (labels.scalar_type()) {
    case ScalarType::Long:
      return {target, codes(labels.const_data_ptr<int64_t>())};
    case ScalarType::Int:
      return {target, codes(labels.const_data_ptr<int32_t>())};
    case ScalarType::Short:
      return {target, codes(labels.const_data_ptr<int16_t>())};
    case ScalarType::Char:
      return {target, codes(labels.const_data_ptr<int8_t>())};
    case ScalarType::Byte:
      return {target, codes(labels.const_data_ptr<uint8_t>())};
    default:
      fail("labels: expected integers, got ", labels.scalar_type());
  }
}

}  // namespace sface
