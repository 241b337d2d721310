// Which instruction set runs, decided once. Each file in simd/ says what it needs.
#include <cstdlib>

#include "ops.h"

namespace sface {

namespace baseline {
extern const Kernels* const table;
}
namespace avx2 {
bool supported();
extern const Kernels* const table;
}  // namespace avx2
namespace avx512 {
bool supported();
extern const Kernels* const table;
}  // namespace avx512
namespace amx {
bool supported();
extern const Kernels* const table;
}  // namespace amx

// setup.py defines SFACE_WITHOUT_… for each file of simd/ that the compiler cannot compile.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#if defined(__x86_64__) && defined(__linux__) && !defined(SFACE_WITHOUT_AMX)
  if (amx::supported()) usable.push_back(amx::table);
#endif
#if defined(__x86_64__) && !defined(SFACE_WITHOUT_AVX512)
  if (avx512::supported()) usable.push_back(avx512::table);
#endif
#if defined(__x86_64__) && !defined(SFACE_WITHOUT_AVX2)
  if (avx2::supported()) usable.push_back(avx2::table);
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
  fail("SFACE_CPU_ISA: expected one of ", names, " on this CPU, got ", wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace sface
