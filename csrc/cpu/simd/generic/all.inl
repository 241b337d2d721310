// Everything that is compiled once per instruction set, in the order in which each part builds on those before it.
// Included inside a namespace that has defined F32, I32, I16 and what one file in `simd/` says of its vectors.
#include "pack.inl"

#include "device_math.inl"

#include "vectors.inl"

#if defined(SFACE_PRODUCTS)
#include SFACE_PRODUCTS
#else
#include "products.inl"
#endif
#include "dense.inl"
#include "screen.inl"
#include "update.inl"
#if defined(SFACE_INT8)
#include SFACE_INT8
#else
// No int8 screen: what kernels.inl asks of one.
struct Int8 {
  static constexpr decltype(Kernels::pack_int8) pack = nullptr;
  static constexpr double kWaste = 0;
  static void plan(const Group&, Ahead&) {}
  static void prepare_rows(const float* const*, const float*, const float*, int, int, float*, Ahead&, Workspace&) {}
  static void screen(const Rules&, const Group&, const Block&, Ahead&, RowSums&, Workspace&) {}
};
#endif

#if defined(SFACE_FAR)
#include SFACE_FAR
#else
// No coarser products for far pairs: what kernels.inl asks of them.
struct Far {
  static constexpr bool kThere = false;
  static constexpr decltype(Kernels::pack_far) pack = nullptr;
  static constexpr decltype(Kernels::add_far) add = nullptr;
  static constexpr int kSamples = 0;
  static double near_share(int) { return 0; }
  static int64_t bytes(int64_t) { return 0; }
  static void add_unit_rows(const Group&, const Block&, Workspace&) {}
  static void store(const Group&, const Block&, const Workspace&, Arena&) {}
};
#endif

#include "kernels.inl"
