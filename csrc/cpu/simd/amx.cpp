// The kernels for AVX-512 with AMX: those of avx512.cpp, with the screen's int8 products and the dense blocks' products
// in matrix tiles. The headers come before the target region, as there.
#include "../kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "target.h"
#define SFACE_FEATURES(feature, separator)                                                            \
  feature("avx2") separator feature("fma") separator feature("popcnt") separator feature("bmi")       \
      separator feature("avx512f") separator feature("avx512bw") separator feature("avx512dq")        \
          separator feature("avx512vl") separator feature("avx512vnni") separator feature("amx-tile") \
              separator feature("amx-int8") separator feature("amx-bf16")

namespace sface::amx {
// A process asks the system once before its threads may use tiles; PyTorch's own products do the same.
bool supported() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return SFACE_SUPPORTED(SFACE_FEATURES) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
}  // namespace sface::amx

SFACE_TARGET_BEGIN(SFACE_FEATURES)
namespace sface::amx {
namespace {
constexpr const char* kName = "avx512_amx";
// The int8 products take so little time that w has to come as fast as it can, and a core brings more of it from several
// places at a time (a forward of 128 samples: 20 ms from one, 16 from two, 15 from four).
constexpr int kStreams = 4;

#include "avx512_vectors.inl"
#include "amx_tiles.inl"

#define SFACE_PRODUCTS "../amx_products.inl"
#define SFACE_INT8 "../amx_int8.inl"
#include "generic/all.inl"
}  // namespace
extern const Kernels* const table = &kTable;
}  // namespace sface::amx
SFACE_TARGET_END
#endif
