// Which instruction set runs, decided once.
#include <c10/util/Exception.h>

#include <cstdlib>

#include "kernels.h"

namespace sface {

namespace baseline {
extern const Kernels* const table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels* const table;
}
namespace avx512 {
extern const Kernels* const table;
}
#endif

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    usable.push_back(avx512::table);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") &&
      __builtin_cpu_supports("bmi"))
    usable.push_back(avx2::table);
#endif
  usable.push_back(baseline::table);
  return usable;
}

namespace {

const Kernels& choose() {
  const std::vector<const Kernels*> usable = usable_kernels();
  const char* wanted = std::getenv("SFACE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *usable.front();
  std::string names;
  for (const Kernels* kernels : usable) {
    if (kernels->name == std::string(wanted)) return *kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  TORCH_CHECK(false, "SFACE_CPU_ISA: expected one of ", names, " on this CPU, got ", wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace sface
