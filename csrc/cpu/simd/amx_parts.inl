// Products of floats from AMX's bf16 tiles, as accurate as fp32's.
//
// A float is the sum of three bf16 numbers, its parts v₀ + v₁ + v₂, each at most 2⁻⁸ of the one before. Six products of
// parts make one of floats,
//
//   ab ≈ a₀b₀ + (a₀b₁ + a₁b₀) + (a₀b₂ + a₁b₁ + a₂b₀)      to 2⁻²³ of |a||b| (docs/math.md, 3),
//
// added in fp32; a tile does 16 of them while a vector unit does one of fp32. Operands lie in memory as tiles of
// 1 KB in the order in which they are read: for every 32 terms of the sum [part][tile]. Included after vectors.inl.

constexpr int kParts = 3;
constexpr int kColumnWords = kParts * kPanel / 2;
constexpr int kTileRows = 16, kTileBytes = 1024;
constexpr int kTerms = 32;                              // of a sum, in a tile
constexpr int kBlockTiles = kBlockClasses / kTileRows;  // of classes
constexpr int kPanelTiles = 2;                          // of samples, or of as many features
constexpr int kBlockStep = kParts * kBlockTiles * kTileBytes, kPanelStep = kParts * kPanelTiles * kTileBytes;
static_assert(kBlockTiles == 3 && kPanel == kPanelTiles * kTileRows && kPanel == kTerms && kFeaturePad == kTerms);

// The parts of 16 numbers, each in the upper half of its lane; of the last one the lower halves are to be ignored.
struct Parts {
  I32 v[kParts];
  SFACE_INLINE explicit Parts(F32 rest) {
    for (int p = 0; p + 1 < kParts; ++p) {
      v[p] = (I32(rest) + 0x8000) & broadcast_int(-0x10000);
      rest -= F32(v[p]);
    }
    v[kParts - 1] = I32(rest);
  }
};

// Two bf16 numbers a lane.
SFACE_INLINE I32 pairs(I32 low, I32 high) { return I32(U32(low) >> 16) | (high & broadcast_int(-0x10000)); }
SFACE_INLINE void store_pairs(uint8_t* to, I32 low, I32 high) {
  store_int(reinterpret_cast<int32_t*>(to), pairs(low, high));
}

// Which of the products of parts: that of the first ones, the three of the first two, the three that these lack, or
// all.
enum class Which { kOne, kFirst, kRest, kAll };

inline int products_of(Which which) { return which == Which::kOne ? 1 : which == Which::kAll ? 6 : 3; }

// 16 columns of c = a · b, as multiply_floats; b from the first of their tiles on. Tiles 0, 1, 2: sums; 3: b; 4: a.
template <int kRowTiles, bool kAdd>
SFACE_INLINE void multiply_columns(Which which, const uint8_t* a, const uint8_t* b, int steps, float* c, int64_t bytes,
                                   Ahead* ahead) {
  static_assert(kRowTiles == 2 || kRowTiles == 3);
  constexpr int kA = kRowTiles * kTileBytes, kB = kPanelTiles * kTileBytes;
  const int64_t words = bytes / static_cast<int64_t>(sizeof(float));
  float* const second = c + kTileRows * words;
  float* const third = second + kTileRows * words;
  if constexpr (kAdd) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, second, bytes);
    if constexpr (kRowTiles == 3) _tile_loadd(2, third, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kRowTiles == 3) _tile_zero(2);
  }
  const auto load_part = [&](int q) __attribute__((always_inline)) { _tile_loadd(3, b + q * kB, 64); };
  const auto add_part = [&](int p) __attribute__((always_inline)) {  // of a, times the part of b that was loaded
    const uint8_t* const rows = a + p * kA;
    _tile_loadd(4, rows, 64);
    _tile_dpbf16ps(0, 4, 3);
    _tile_loadd(4, rows + kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 3);
    if constexpr (kRowTiles == 3) {
      _tile_loadd(4, rows + 2 * kTileBytes, 64);
      _tile_dpbf16ps(2, 4, 3);
    }
    if (ahead) ahead->step();
  };
  for (int step = 0; step < steps; ++step, a += kParts * kA, b += kParts * kB) {
    if (which == Which::kAll || which == Which::kRest) {
      load_part(2);
      add_part(0);
      load_part(1);
      add_part(1);
    }
    load_part(0);
    if (which == Which::kAll || which == Which::kRest) add_part(2);
    if (which == Which::kAll || which == Which::kFirst) add_part(1);
    if (which != Which::kRest) add_part(0);
    if (which == Which::kAll || which == Which::kFirst) {
      load_part(1);
      add_part(0);
    }
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, second, bytes);
  if constexpr (kRowTiles == 3) _tile_stored(2, third, bytes);
}

// c[16·kRowTiles][32] = a · b over `steps` of 32 terms, added to what is there with kAdd; a [steps][part][kRowTiles], b
// [steps][part][2].
template <int kRowTiles, bool kAdd>
inline void multiply_floats(Which which, const uint8_t* a, const uint8_t* b, int steps, float* c, int64_t stride,
                            Ahead* ahead) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  finish_writing();
  for (int column = 0; column < kPanelTiles; ++column)
    multiply_columns<kRowTiles, kAdd>(which, a, b + column * kTileBytes, steps, c + column * kTileRows, bytes, ahead);
  finish_writing();
}
