// The int8 screen by AMX: a tile of 16 classes times one of 16 samples, 64 features at a time.
#include "avx512_int8.inl"

class Int8Screen : public Int8Sums {
 public:
  Int8Screen(const Rules& rules, const Group& group, Workspace& work)
      : Int8Sums(rules, group, work), depth_(int8_depth(group.d)) {}

  // w is fetched ahead during the products too, or their time would be lost for it (measured: 2 to 5 % of a forward).
  int64_t steps() const { return kStripRows + kHalves * depth_ / 64 / kStrips; }

  // Those of all strips come with the first.
  Products& multiply_tile(int strip, int panel, Ahead& ahead) {
    if (strip == 0) multiply_block(panel, ahead);
    return products_[strip];
  }

  void sum(const Block& block, int strip, int panel, bool masked, const Products& products, RowSums&, Ahead& ahead) {
    sum_strip(block, strip, panel, masked, products, &ahead);
  }

 private:
  static constexpr int kTile = 16, kStrips = kBlockClasses / kStripRows;
  static constexpr int kHalves = kPanel / kTile;
  static_assert(kBlockClasses == 3 * kTile && kHalves == 2 && kBlockClasses % kStripRows == 0);

  // Half a panel's samples at a time. Tiles 0, 1, 2: sums of 16 classes each; 3: samples; 4: classes.
  void multiply_block(int panel, Ahead& ahead) {
    finish_writing();
    constexpr int kStride = kPanel * sizeof(int32_t);
    const int64_t next_tile = int64_t{kTile} * depth_;
    for (int half = 0; half < kHalves; ++half) {
      const int first = half * kTile;  // sample of the panel
      const int32_t* start = group_.int8.start + panel * kPanel + first;
      _tile_loadd(0, start, 0);  // a stride of 0: the same start for every class
      _tile_loadd(1, start, 0);
      _tile_loadd(2, start, 0);
      const uint8_t* w = work_.int8.data.get();
      const int32_t* x = group_.int8.words + int64_t{panel} * depth_ / 4 * kPanel + first;
      for (int k = 0; k < depth_; k += 64, x += kTile * kPanel, w += 64) {
        _tile_loadd(3, x, kStride);
        _tile_loadd(4, w, depth_);
        _tile_dpbusd(0, 4, 3);
        _tile_loadd(4, w + next_tile, depth_);
        _tile_dpbusd(1, 4, 3);
        ahead.step();
        _tile_loadd(4, w + 2 * next_tile, depth_);
        _tile_dpbusd(2, 4, 3);
      }
      int32_t* out = reinterpret_cast<int32_t*>(products_) + first;
      _tile_stored(0, out, kStride);
      _tile_stored(1, out + kTile * kPanel, kStride);
      _tile_stored(2, out + 2 * kTile * kPanel, kStride);
    }
  }

  TileRegisters registers_;
  int depth_;  // bytes of a row
  alignas(64) Products products_[kStrips];
};

struct Int8 : Int8Preparation {
  // As in vnni_int8.inl; int16, which has no tiles, takes twice as long.
  static constexpr double kWaste = 0.065;

  // Half at N = 128, where less during the preparation and more during the sums takes longer (measured at D = 512).
  static void plan(const Group& group, Ahead& ahead) { plan_share(group, 1 / (1 + 0.25 * group.panels), ahead); }

  static void screen(const Rules& rules, const Group& group, const Block& block, Ahead& ahead, RowSums& sums,
                     Workspace& work) {
    screen_block(Int8Screen(rules, group, work), group, block, ahead, sums, work);
  }
};
