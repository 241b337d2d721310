// Registers the CPU implementations of the operators that sface_kernels/ops.py declares. This library is no Python
// module: sface_kernels/backends/native.py loads it.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

namespace sface {

std::vector<std::string> native_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable_kernels()) names.emplace_back(kernels->name);
  return names;
}

std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, double, double> native_constants() {
  return {kBlockClasses, kGroupSamples, kNoTarget, kIgnored, kInvalid, kNormEps, kCandidateShare};
}

}  // namespace sface

STABLE_TORCH_LIBRARY_IMPL(sface, CPU, m) {
  m.impl("native_labels", TORCH_BOX(&sface::native_labels));
  m.impl("native_forward", TORCH_BOX(&sface::native_forward));
  m.impl("native_forward_early", TORCH_BOX(&sface::native_forward_early));
  m.impl("native_grad_weight", TORCH_BOX(&sface::native_grad_weight));
  m.impl("native_grad_weight_rest", TORCH_BOX(&sface::native_grad_weight_rest));
  m.impl("native_sgd_step", TORCH_BOX(&sface::native_sgd_step));
  m.impl("native_adamw_step", TORCH_BOX(&sface::native_adamw_step));
}

STABLE_TORCH_LIBRARY_IMPL(sface, CompositeExplicitAutograd, m) {
  m.impl("native_constants", TORCH_BOX(&sface::native_constants));
  m.impl("native_instruction_sets", TORCH_BOX(&sface::native_instruction_sets));
}
