// Registers the CPU implementations of the operators that sface_kernels/ops.py declares.
#include <Python.h>
#include <torch/library.h>

#include "cpu/ops.h"

namespace sface {

std::vector<std::string> native_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable_kernels()) names.emplace_back(kernels->name);
  return names;
}

std::tuple<int64_t, int64_t, int64_t, int64_t, double, double> native_constants() {
  return {kBlockClasses, kGroupSamples, kIgnored, kInvalid, kNormEps, kCandidateShare};
}

}  // namespace sface

TORCH_LIBRARY_IMPL(sface, CPU, m) {
  m.impl("native_forward", sface::native_forward);
  m.impl("native_grad_weight", sface::native_grad_weight);
}

TORCH_LIBRARY_IMPL(sface, CompositeExplicitAutograd, m) {
  m.impl("native_constants", sface::native_constants);
  m.impl("native_instruction_sets", sface::native_instruction_sets);
  m.impl("native_release_memory", sface::release_memory);
}

// Importing the module is what loads the library; it holds nothing else.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
