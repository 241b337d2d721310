// The products of blocks of classes that are dense in active pairs, by AMX. Included after vectors.inl.
#include "amx_parts.inl"

// Share of candidates above which products beat rescoring pair by pair: that of fp32's products, which take somewhat
// longer than three parts do.
constexpr double kDenseShare = 0.18;

// Blocks whose Σ g ŵ is added at once: 48 classes would fill one tile and a half, and sums be loaded and stored twice
// as often.
constexpr int kPendingBlocks = 2;
constexpr int kPendingSteps = kPendingBlocks * kBlockClasses / kTerms;
// Tiles take a number below 2⁻¹²⁶ for 0. Coefficients, which go down to there, are multiplied times this, ∂x̂ with them.
constexpr float kDenseGradScale = 0x1p100f;

// The operands in Workspace::parts.
struct PartsMemory {
  uint8_t* block;         // ŵ of a block [D / 32][part][3], classes by features
  uint8_t* pending;       // ŵ of blocks [D / 32][pending steps][part][2], classes by features
  uint8_t* coefficients;  // [panels][pending steps][part][2] samples by classes; [panels][part][3] classes by samples
  PartsMemory(Workspace& work, int padded_d)
      : block(work.parts.data.get()),
        pending(block + int64_t{padded_d} / kTerms * kBlockStep),
        coefficients(pending + int64_t{padded_d} / kTerms * kPendingSteps * kPanelStep) {}
};

int64_t parts_bytes(int64_t padded_d) {
  constexpr int kPanels = kGroupSamples / kPanel;
  static_assert(kPendingSteps * kPanelStep >= kBlockStep);
  return padded_d / kTerms * (kBlockStep + kPendingSteps * kPanelStep) + int64_t{kPanels} * kPendingSteps * kPanelStep;
}

// x̂ of a panel as [padded D / 32][part][2] tiles of features by samples: features k and k + 16 of 32 share a word.
void pack_columns(const float* rows, int count, int, int padded_d, float* columns) {
  uint8_t* out = reinterpret_cast<uint8_t*>(columns);
  for (int k = 0; k < padded_d; k += kTerms, out += kPanelStep) {
    if (count < kPanel) std::memset(out, 0, kPanelStep);
    for (int i = 0; i < count; ++i) {
      const float* row = rows + static_cast<int64_t>(i) * padded_d + k;
      const Parts low(load(row)), high(load(row + kLanes));
      for (int p = 0; p < kParts; ++p) {
        int32_t words[kLanes];
        store_int(words, pairs(low.v[p], high.v[p]));
        uint8_t* tile = out + (p * kPanelTiles + i / kTileRows) * kTileBytes + i % kTileRows * 4;
        for (int l = 0; l < kLanes; ++l) std::memcpy(tile + l * 64, words + l, 4);
      }
    }
  }
}

// The parts kFirst … kEnd − 1 of a block of ŵ, in the order of pack_columns; and kPend … kPendEnd − 1 as tiles of
// classes by features, in the place of the next pending block.
template <int kFirst, int kEnd, int kPend, int kPendEnd>
inline void pack_classes(const Group& group, const Block& block, Workspace& work, Ahead* ahead) {
  const PartsMemory to(work, group.padded_d);
  // half of the next block here: all of it would take longer than the products
  if (ahead) ahead->plan(ahead->left / 2, int64_t{kBlockClasses} / 2 * group.padded_d / kTerms);
  for (int row = 0; row < kBlockClasses; row += 2) {
    const float* w[2];
    float inv[2] = {};
    int d[2];
    for (int r = 0; r < 2; ++r) {
      const bool there = row + r < block.count && is_finite(work.inv_norm[row + r]);  // else zeros
      w[r] = block.w + (there ? row + r : 0) * block.row_stride;
      d[r] = there ? group.d : 0;
      if (there) inv[r] = work.inv_norm[row + r];
    }
    const int at = work.pending * kBlockClasses + row;
    uint8_t* out = to.block + row / kTileRows * kTileBytes + row % kTileRows * 64;
    uint8_t* pending = to.pending + at / kTerms * kPanelStep + at % kTerms / 2 * 64;
    for (int k = 0; k < group.padded_d; k += kTerms, out += kBlockStep, pending += kPendingSteps * kPanelStep) {
      if (ahead) ahead->step();
      const Parts first[2] = {Parts(load_first(w[0] + k, d[0] - k) * inv[0]),
                              Parts(load_first(w[0] + k + kLanes, d[0] - k - kLanes) * inv[0])};
      const Parts second[2] = {Parts(load_first(w[1] + k, d[1] - k) * inv[1]),
                               Parts(load_first(w[1] + k + kLanes, d[1] - k - kLanes) * inv[1])};
      for (int p = kFirst; p < kEnd; ++p) {
        uint8_t* tile = out + p * kBlockTiles * kTileBytes;
        store_pairs(tile, first[0].v[p], first[1].v[p]);
        store_pairs(tile + 64, second[0].v[p], second[1].v[p]);
      }
      for (int p = kPend; p < kPendEnd; ++p)
        for (int half = 0; half < 2; ++half)
          store_pairs(pending + (p * kPanelTiles + half) * kTileBytes, first[half].v[p], second[half].v[p]);
    }
  }
}

template <bool kAdd>
inline void multiply_cosines(Which which, const Group& group, Workspace& work, Ahead* ahead) {
  const PartsMemory parts(work, group.padded_d);
  const int steps = group.padded_d / kTerms, products = products_of(which);
  if (ahead) ahead->plan(ahead->left, int64_t{steps} * group.panels * kPanelTiles * products);
  const TileRegisters registers;
  for (int panel = 0; panel < group.panels; ++panel)
    multiply_floats<kBlockTiles, kAdd>(
        which, parts.block, reinterpret_cast<const uint8_t*>(group.columns) + int64_t{panel} * steps * kPanelStep,
        steps, work.tile.data() + panel * kPanel, group.panels * kPanel, ahead);
}

// Whether no other class comes as near as that; own classes are overwritten.
inline bool all_below(float cosine, const Group& group, const Block& block, Workspace& work) {
  const int stride = group.panels * kPanel;
  float* const tile = work.tile.data();
  for (int i = 0; i < block.own_count; ++i) tile[block.own[i].row * stride + block.own[i].sample] = -1;
  F32 largest = broadcast(-1.0f);
  for (int i = 0; i < block.count * stride; i += kLanes) largest = larger(load(tile + i), largest);
  return largest_lane(largest) < cosine;
}

inline void finish_unit_rows(const Group& group, Workspace& work);

// (1) for a block: tile[row][panels·kPanel]. With kPend ŵ is left for add_unit_rows: of far blocks the first part, as
// long as all that are pending are far.
template <bool kPend>
inline void cosine_tile(const Rules& rules, const Group& group, const Block& block, Workspace& work, Ahead* ahead) {
  constexpr int kOne = kPend ? 1 : 0, kAll = kPend ? kParts : 0;
  work.far = false;
  if (rules.far_cosine <= -1) {
    pack_classes<0, 3, 0, kAll>(group, block, work, ahead);
    return multiply_cosines<false>(Which::kAll, group, work, ahead);
  }
  pack_classes<0, 2, 0, kOne>(group, block, work, ahead);
  multiply_cosines<false>(Which::kFirst, group, work, ahead);
  work.far = all_below(rules.far_cosine, group, block, work);
  if (work.far) {
    if (!work.pending_far) pack_classes<0, 0, kOne, kAll>(group, block, work, nullptr);
    return;
  }
  if (kPend && work.pending_far) finish_unit_rows(group, work);
  pack_classes<2, 3, 0, kAll>(group, block, work, nullptr);
  multiply_cosines<true>(Which::kRest, group, work, nullptr);
}

// rows[i][lane l] becomes rows[l][lane i].
SFACE_INLINE void transpose(F32 rows[kLanes]) {
  __m512 a[kLanes], b[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2) {
    a[i] = _mm512_unpacklo_ps(__m512(rows[i]), __m512(rows[i + 1]));
    a[i + 1] = _mm512_unpackhi_ps(__m512(rows[i]), __m512(rows[i + 1]));
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 4)
    for (int h = 0; h < 2; ++h) {
      const __m512d low = _mm512_castps_pd(a[i + h]), high = _mm512_castps_pd(a[i + 2 + h]);
      b[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
    // b[i + l]: of the rows i … i + 3 the columns l, l + 4, l + 8, l + 12
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
    const __m512 low02 = _mm512_shuffle_f32x4(b[l], b[4 + l], 0x88), low13 = _mm512_shuffle_f32x4(b[l], b[4 + l], 0xdd);
    const __m512 high02 = _mm512_shuffle_f32x4(b[8 + l], b[12 + l], 0x88);
    const __m512 high13 = _mm512_shuffle_f32x4(b[8 + l], b[12 + l], 0xdd);
    rows[l] = F32(_mm512_shuffle_f32x4(low02, high02, 0x88));
    rows[8 + l] = F32(_mm512_shuffle_f32x4(low02, high02, 0xdd));
    rows[4 + l] = F32(_mm512_shuffle_f32x4(low13, high13, 0x88));
    rows[12 + l] = F32(_mm512_shuffle_f32x4(low13, high13, 0xdd));
  }
}

// The coefficients of 16 classes from `row` on against 16 samples from `i` on, as samples by classes.
inline void pack_coefficients(const float* tile, int stride, int row, int rows, int i, uint8_t* out) {
  F32 g[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r)
    g[r] = row + r < rows ? load(tile + (row + r) * stride + i) * kDenseGradScale : F32{};
  transpose(g);
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    const Parts parts(g[r]);
    for (int p = 0; p < kParts; ++p)
      *reinterpret_cast<I16*>(out + p * kPanelTiles * kTileBytes + r * 64) =
          __builtin_convertvector(I32(U32(parts.v[p]) >> 16), I16);
  }
}

// work.dense_grad[padded D / kPanel][group][kPanel] += Σ g ŵ of the pending blocks.
inline void finish_unit_rows(const Group& group, Workspace& work) {
  if (work.pending == 0) return;
  const PartsMemory parts(work, group.padded_d);
  if (!work.has_dense_grad) std::memset(work.dense_grad.data.get(), 0, sizeof(float) * group.padded_d * kGroupSamples);
  work.has_dense_grad = true;
  const int steps = (work.pending * kBlockClasses + kTerms - 1) / kTerms;
  constexpr int kStride = kPendingSteps * kPanelStep;
  // one block ends within a tile: 0 from there on
  if (work.pending * kBlockClasses % kTerms)
    for (int tile = 0; tile < kParts * kPanelTiles; ++tile) {
      uint8_t* const last = parts.pending + (steps - 1) * kPanelStep + tile * kTileBytes;
      for (int k = 0; k < group.padded_d; k += kTerms)
        std::memset(last + int64_t{k} / kTerms * kStride + kTileBytes / 2, 0, kTileBytes / 2);
      for (int panel = 0; panel < group.panels; ++panel)
        for (int i = 0; i < kTileRows; ++i)
          std::memset(parts.coefficients + panel * kStride + (steps - 1) * kPanelStep + tile * kTileBytes + i * 64 + 32,
                      0, 32);
    }
  const Which which = work.pending_far ? Which::kOne : Which::kAll;
  work.pending = 0;
  work.pending_far = true;
  const TileRegisters registers;
  for (int k = 0; k < group.padded_d; k += kTerms)
    for (int panel = 0; panel < group.panels; ++panel)
      multiply_floats<kPanelTiles, true>(
          which, parts.coefficients + panel * kStride, parts.pending + int64_t{k} / kTerms * kStride, steps,
          work.dense_grad.data.get() + static_cast<int64_t>(k) * kGroupSamples + panel * kPanel * kPanel, kPanel,
          nullptr);
}

// Σ_r tile[r][i] ŵ_r to be added to work.dense_grad; ŵ stands in the operands since cosine_tile<true>.
inline void add_unit_rows(const Group& group, const Block& block, Workspace& work) {
  const PartsMemory parts(work, group.padded_d);
  const int stride = group.panels * kPanel;
  for (int row = 0; row < kBlockClasses; row += kTileRows) {
    const int at = work.pending * kBlockClasses + row;
    uint8_t* out = parts.coefficients + at / kTerms * kPanelStep + at % kTerms * 2;
    for (int i = 0; i < stride; i += kTileRows)
      pack_coefficients(work.tile.data(), stride, row, block.count, i,
                        out + i / kPanel * kPendingSteps * kPanelStep + i % kPanel / kTileRows * kTileBytes);
  }
  work.pending_far &= work.far;
  if (++work.pending == kPendingBlocks) finish_unit_rows(group, work);
}

// x̂ of a group as [padded D / 32][panels][part][2] tiles of samples by features: samples i and i + 16 of 32 share a
// word.
void pack_features(const float* rows, int count, int padded_d, float* columns) {
  uint8_t* out = reinterpret_cast<uint8_t*>(columns);
  for (int k = 0; k < padded_d; k += kTerms)
    for (int start = 0; start < count; start += kPanel, out += kPanelStep)
      for (int i = 0; i < kTileRows; ++i)
        for (int half = 0; half < kPanelTiles; ++half) {
          const float* const row = rows + static_cast<int64_t>(start + i) * padded_d + k + half * kLanes;
          const Parts low(start + i < count ? load(row) : F32{});
          const Parts high(start + i + kTileRows < count ? load(row + int64_t{kTileRows} * padded_d) : F32{});
          for (int p = 0; p < kParts; ++p)
            store_pairs(out + (p * kPanelTiles + half) * kTileBytes + i * 64, low.v[p], high.v[p]);
        }
}

// A power of two that brings a row's largest entry near 1, so that all its parts and products stay above 2⁻¹²⁶; and
// what takes it back.
struct RowScale {
  float up, down;
  SFACE_INLINE explicit RowScale(float largest) {
    const uint32_t exponent = bit_cast<uint32_t>(largest) >> 23;
    const uint32_t within = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    up = bit_cast<float>((254 - within) << 23);
    down = bit_cast<float>(within << 23);
  }
};

void add_dense(const Rules& rules, const float* tile, int tile_stride, const float* u, const Block& block,
               const float* columns, int count, int padded_d, float* raw, Workspace& work) {
  const PartsMemory parts(work, padded_d);
  const int steps = (count + kTerms - 1) / kTerms, rows = block.count;
  float down[kBlockClasses];
  F32 largest_weight{};
  Ahead ahead(block);
  ahead.plan(ahead.left / 4, rows);
  for (int r = 0; r < rows; ++r) {
    ahead.step();
    const float* const row = tile + r * tile_stride;
    F32 largest{}, scaled[kGroupSamples / kLanes];
    for (int i = 0; i < count; i += kLanes) {
      const F32 weight = load_first(row + i, count - i);
      largest_weight = larger(weight, largest_weight);
      scaled[i / kLanes] = weight * load_first(u + i, count - i);
      largest = larger(largest, absolute(scaled[i / kLanes]));
    }
    if (count % kTerms > 0 && count % kTerms <= kLanes) scaled[count / kLanes + (count % kLanes > 0)] = F32{};
    const RowScale scale(largest_lane(largest));
    down[r] = scale.down;
    uint8_t* out = parts.coefficients + r / kTileRows * kTileBytes + r % kTileRows * 64;
    for (int v = 0; v < steps * kPanelTiles; v += kPanelTiles, out += kBlockStep) {
      const Parts low(scaled[v] * scale.up), high(scaled[v + 1] * scale.up);
      for (int p = 0; p < kParts; ++p) store_pairs(out + p * kBlockTiles * kTileBytes, low.v[p], high.v[p]);
    }
  }
  const Which which = largest_lane(largest_weight) < rules.far_share ? Which::kOne : Which::kAll;
  ahead.plan(ahead.left, int64_t{padded_d} / kTerms * kPanelTiles * steps * products_of(which));
  alignas(64) float sums[kBlockClasses * kTerms];
  const TileRegisters registers;
  for (int k = 0; k < padded_d; k += kTerms) {
    multiply_floats<kBlockTiles, false>(
        which, parts.coefficients, reinterpret_cast<const uint8_t*>(columns) + int64_t{k} / kTerms * steps * kPanelStep,
        steps, sums, kTerms, &ahead);
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < kTerms; v += kLanes) {
        float* const out = raw + static_cast<int64_t>(r) * padded_d + k + v;
        store(out, load(out) + down[r] * load(sums + r * kTerms + v));
      }
  }
}
