// The int8 screen by vpdpbusd, four products and their sum in a lane.
#include "avx512_int8.inl"

class Int8Screen : public Int8Sums {
 public:
  Int8Screen(const Rules& rules, const Group& group, Workspace& work)
      : Int8Sums(rules, group, work), depth_(int8_depth(group.d) / 4) {}

  int64_t steps() const { return depth_; }

  static SFACE_INLINE I32 dot(I32 sum, I32 x, I32 w) {
    return I32(_mm512_dpbusd_epi32(__m512i(sum), __m512i(w), __m512i(x)));
  }

  Products& multiply_tile(int strip, int panel, Ahead& ahead) {
    I32 start[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) start[v] = load_int(group_.int8.start + panel * kPanel + v * kLanes);
    const int32_t* w = reinterpret_cast<const int32_t*>(work_.int8.data.get()) + int64_t{strip} * kStripRows * depth_;
    multiply<Int8Screen>(w, group_.int8.words + int64_t{panel} * depth_ * kPanel, start, depth_, ahead, products_);
    return products_;
  }

  void sum(const Block& block, int strip, int panel, bool masked, const Products& products, RowSums&, Ahead&) {
    sum_strip(block, strip, panel, masked, products, nullptr);
  }

 private:
  int depth_;  // words of four features
  Products products_;
};

struct Int8 : Int8Preparation {
  // Of the pairs it may leave as candidates without being active, as it is faster than int16 still.
  // On Zen 4 5.5 and 8 % are as fast, and 0.87 to 0.95 of the time with 3 %, where it matters.
  static constexpr double kWaste = 0.055;

  // A panel's products and sums take about as long as 2/3 of the rows' preparation (measured at D = 512).
  static void plan(const Group& group, Ahead& ahead) { plan_share(group, 1 / (1 + 1.2 * group.panels), ahead); }

  static void screen(const Rules& rules, const Group& group, const Block& block, Ahead& ahead, RowSums& sums,
                     Workspace& work) {
    screen_block(Int8Screen(rules, group, work), group, block, ahead, sums, work);
  }
};
