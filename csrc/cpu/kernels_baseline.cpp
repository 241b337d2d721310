// The kernels for every CPU that the compiler's default flags allow: SSE2, NEON or plain C++.
#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstring>
#include <vector>

namespace sface::baseline {
namespace {
#include "isa_baseline.h"

#include "pack.inl"

#include "../device_math.h"
#include "vectors.inl"

#include "dense.inl"
#include "screen.inl"

#include "kernels.inl"
}  // namespace
extern const Kernels* const table = &kTable;
}  // namespace sface::baseline
