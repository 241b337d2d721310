// Products of floats from AMX's bf16 tiles, as accurate as fp32's.
//
// A float is the sum of three bf16 numbers, its parts v₀ + v₁ + v₂, each at most 2⁻⁸ of the one before. Six products of
// parts make one of floats,
//
//   ab ≈ a₀b₀ + (a₀b₁ + a₁b₀) + (a₀b₂ + a₁b₁ + a₂b₀)      to 2⁻²³ of |a||b| (docs/math.md, 3),
//
// added in fp32; a tile does 16 of them while a vector unit does one of fp32. Operands lie in memory as tiles of
// 1 KB in the order in which they are read: for every 32 terms of the sum [part][tile]. Included after vectors.inl.

constexpr int kParts = 3, kProducts = 6;
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

// One pair of parts: sums in the tiles 0 … 5, [kRowTiles][2], += a · b.
template <int kRowTiles>
SFACE_INLINE void multiply_parts(const uint8_t* a, const uint8_t* b) {
  _tile_loadd(6, a, 64);
  _tile_loadd(7, b, 64);
  _tile_dpbf16ps(0, 6, 7);
  _tile_loadd(7, b + kTileBytes, 64);
  _tile_dpbf16ps(1, 6, 7);
  _tile_loadd(6, a + kTileBytes, 64);
  _tile_dpbf16ps(3, 6, 7);
  _tile_loadd(7, b, 64);
  _tile_dpbf16ps(2, 6, 7);
  if constexpr (kRowTiles == 3) {
    _tile_loadd(6, a + 2 * kTileBytes, 64);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, b + kTileBytes, 64);
    _tile_dpbf16ps(5, 6, 7);
  }
}

// Which of the products of parts: those of the first two parts, the three that make up for the others, or all.
enum class Which { kFirst, kRest, kAll };

// c[16·kRowTiles][32] = a · b over `steps` of 32 terms, added to what is there with kAdd; a [steps][part][kRowTiles], b
// [steps][part][2].
template <int kRowTiles, bool kAdd>
inline void multiply_floats(Which which, const uint8_t* a, const uint8_t* b, int steps, float* c, int64_t stride,
                            Ahead* ahead) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  float* const second = c + kTileRows * stride;
  float* const third = second + kTileRows * stride;
  finish_writing();
  if constexpr (kAdd) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + kTileRows, bytes);
    _tile_loadd(2, second, bytes);
    _tile_loadd(3, second + kTileRows, bytes);
    if constexpr (kRowTiles == 3) {
      _tile_loadd(4, third, bytes);
      _tile_loadd(5, third + kTileRows, bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  }
  constexpr int kA = kRowTiles * kTileBytes, kB = kPanelTiles * kTileBytes;
  const auto add = [&](int p, int q) __attribute__((always_inline)) {
    multiply_parts<kRowTiles>(a + p * kA, b + q * kB);
    if (ahead) ahead->step();
  };
  for (int step = 0; step < steps; ++step, a += kParts * kA, b += kParts * kB) {
    if (which != Which::kFirst) {
      add(0, 2);
      add(2, 0);
      add(1, 1);
    }
    if (which != Which::kRest) {
      add(1, 0);
      add(0, 0);
      add(0, 1);
    }
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kTileRows, bytes);
  _tile_stored(2, second, bytes);
  _tile_stored(3, second + kTileRows, bytes);
  if constexpr (kRowTiles == 3) {
    _tile_stored(4, third, bytes);
    _tile_stored(5, third + kTileRows, bytes);
  }
  finish_writing();
}
