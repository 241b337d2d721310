// What one instruction set must provide, and the plain records that go between the drivers and the kernels.
//
// Sizes: N samples, C classes, D features. The drivers (forward.cpp, backward.cpp) own memory and threads; the kernels
// (simd/generic/, compiled once per instruction set) own arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

// The arithmetic on vectors: a call would pass each of them through memory.
#define SFACE_INLINE inline __attribute__((always_inline))

namespace sface {

// v's bits as a To: std::bit_cast, which GCC 10 lacks.
template <typename To, typename From>
SFACE_INLINE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &v, sizeof(To));
  return to;
}

// By their bits: no compiler flag (-ffast-math) and no fused operation changes what these answer. Inlined, so that no
// copy exists that is compiled for one instruction set.
SFACE_INLINE bool is_finite(double v) { return (bit_cast<uint64_t>(v) >> 52 & 0x7ff) != 0x7ff; }
SFACE_INLINE bool is_nan(float v) { return (bit_cast<uint32_t>(v) & 0x7fffffffu) > 0x7f800000u; }

constexpr int kBlockClasses = 48;   // classes handled together: their rows stay in the L2 cache
constexpr int kGroupSamples = 256;  // samples handled together
constexpr int kFeaturePad = 32;     // feature rows in scratch memory are padded to a multiple of this
constexpr float kScale = 32766.0f;  // fixed point: a unit row times this, rounded to int16, never overflows
constexpr int kInt8Pad = 64;        // int8 rows are padded to a multiple of this
// Below, the product is a small part of the time and the error of an int8 cosine a larger one of the loss; above,
// 127²·D would leave int32.
constexpr int64_t kInt8MinFeatures = 256, kInt8MaxFeatures = 1 << 16;
constexpr float kNormEps = 1e-12f;  // torch.nn.functional.normalize's
// Pairs with a smaller share of s are summed with their screened cosine, in a form that is accurate to here.
constexpr double kCandidateShare = 1.0 / 1024;
// A row of w longer than this is computed from kShortening times the row: fp32 holds no square of its components, and
// from 2¹²⁶ on no normal 1/‖w_j‖. In inv_norm stands −1/‖kShortening·w_j‖ then.
constexpr float kLongestRow = 0x1p60f, kShortening = 0x1p-96f;

// Codes in `target`. sface_kernels/types.py has them too, and a test compares what native_constants() returns.
constexpr int64_t kNoTarget = -1;
constexpr int64_t kIgnored = -2;
constexpr int64_t kInvalid = -3;

// What the forward left of one block of classes and one group of samples: a record of the operator's `segments`.
struct Segment {
  int64_t begin;  // first word in the arena
  int64_t count;  // active pairs of two words each, or one of the codes below
};
constexpr int64_t kDenseStored = -1;  // the coefficients stand in the arena as a dense tile, one word each
constexpr int64_t kRecompute = -2;    // the arena was full: the backward computes the block again
constexpr int64_t kFar = -3;  // kFar − n: n active pairs as above, then the coefficients of far pairs, far_words a row

// Words of a row of far coefficients: each holds those of two samples of a panel, i and i + 16, in 16 bits.
constexpr int kFarPanel = 32;
SFACE_INLINE int far_words(int count) {
  const int last = count % kFarPanel;
  return count / kFarPanel * (kFarPanel / 2) + (last < kFarPanel / 2 ? last : kFarPanel / 2);
}

// Uninitialised memory: pages are mapped on first write, so unused parts cost no memory.
// Aligned to a cache line, so that no vector of the kernels straddles two.
template <typename T>
struct Uninitialised {
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, kLine); }
  };
  explicit Uninitialised(int64_t count = 0)
      : data(count > 0 ? static_cast<T*>(::operator new[](sizeof(T) * count, kLine)) : nullptr) {}
  std::unique_ptr<T[], Free> data;
};

struct Hyper {
  float s, k_intra, k_inter, a, b, filter_eps;
};

// How the loss of a pair and its filter are evaluated; derived once per call from Hyper and D.
struct Rules {
  Hyper hyper;
  float slope_log2;       // k_inter·log2(e)
  float keep_above;       // an entry has a gradient where its sigmoid is ≥ this
  bool screen;            // false: every block is dense
  bool far;               // every pair is active, and candidates are the near ones: the others' products may be coarse
  int32_t candidate_min;  // a pair whose screened product is ≥ this is a candidate: it may be active
  bool cheap_below;       // inter_weight_below is accurate for every pair below candidate_min
  bool int8;              // the int8 screen may be used, where there is one
  // Where all pairs of a tile are below these, a coefficient as a share of s and its cosine, they may have the errors
  // of fewer parts: two of each number in cosines, one in the products with coefficients.
  float far_share, far_cosine;
  float active_cosine;  // no pair whose cosine is below this is active: what the int8 screen's own bound comes off
};

// Samples of a panel, or of a group, in the layout of the int8 screen: X_i = round(S_i x̂_i), |X| ≤ 127.
struct Int8Samples {
  int32_t* words;  // [panels][padded D / 4][panel] four features in a word
  int32_t* start;  // [panels][panel] −128 Σ_d X_id, as the classes' features are stored with 128 added
  float* scale;    // [panels][panel] 1/S_i
  float* error;    // [panels][panel] α_i ≥ ‖X_i/S_i − x̂_i‖
};

// A sample whose own class lies in the block: it is no "other class" there.
struct OwnClass {
  int32_t sample;  // within the group
  int32_t row;     // within the block
};

// The samples of one group, prepared once per call.
struct Group {
  int first, count;  // samples [first, first + count)
  int panels;        // panels of Kernels::panel_samples samples, the last one padded with zeros
  int d, padded_d;
  const float* rows;  // [count][padded D] unit rows, fp32
  float* columns;     // [panels][padded D][Kernels::column_words] the same, once a block was dense
  std::once_flag* columns_made;
  const int32_t* fixed_point;    // [panels][padded D / 2][panel] for the screen: two int16 features in a word
  Int8Samples int8;              // for the int8 screen; null where there is none
  float int8_worst_error;        // the largest of int8.error
  const uint32_t* participates;  // [panels] a bit per sample that takes part (not ignored, finite)
};

// What a task adds up for each sample of its group, over its range of classes.
struct RowSums {
  double* inter;           // [count] Σ sigmoid·c over other classes
  double* dropped;         // [count] Σ sigmoid over pairs without a gradient
  float* hardest;          // [count] the largest cosine computed in fp32
  int32_t* hardest_class;  // [count] and its class, the lowest of equals
  int32_t* best;           // [count] the largest screened cosine times kScale² of a pair that is no candidate
  int32_t* best_class;     // [count] and its class
  float* grad;             // [count][padded D] Σ g ŵ, or null
  uint8_t* touched;        // [count] whether grad holds anything yet
};

struct Block {
  int64_t first;   // class of the first row
  int count;       // rows
  const float* w;  // [count] with row_stride
  int64_t row_stride;
  const float* next;    // the first of as many rows that are likely read next, to prefetch, or null
  const OwnClass* own;  // samples of this group with their class in this block
  int own_count;
  bool sum_rows;  // whether its unit rows are to be added to Workspace::class_sum
};

// The task's part of the memory for active pairs.
struct Arena {
  bool wanted;  // false: no gradient of w is needed
  int32_t* words;
  int64_t used, capacity;
};

// What a task found, for the statistics.
struct Tally {
  int64_t active = 0;       // pairs with a gradient
  int64_t dense_pairs = 0;  // pairs computed with dense products
};

// What belongs to one task: a range of classes against a group of samples.
struct Task {
  RowSums sums;
  Arena arena;
  Tally tally;
};

// Scratch memory of one thread, sized by make_workspace.
struct Workspace {
  std::vector<int32_t> fixed_point;  // [block][padded D / 2] screened rows, as in Group
  Uninitialised<uint8_t> int8;       // [block][padded D] W_j + 128, W_j = round(S_j ŵ_j), |W| ≤ 127
  std::vector<float> int8_scale;     // [block] 1/S_j
  std::vector<float> int8_error;     // [block] β_j ≥ ‖W_j/S_j − ŵ_j‖
  int skip_int8 = 0;                 // blocks still screened in int16, as int8 left too many candidates
  std::vector<float> inv_norm;       // [block] 1/‖w_j‖ (of the shortened row), NaN where the row is not finite
  Uninitialised<float> short_rows;   // [block][D] a block that holds rows longer than kLongestRow, with those shortened
  uint64_t shortened = 0;            // a bit per row of the block that was shortened
  std::vector<float> tile;           // [block][group] cosines, then coefficients
  std::vector<float> packed;         // [block][panel] a part of the unit rows for Σ g ŵ
  Uninitialised<float> dense_grad;   // [padded D / panel][group][panel] Σ g ŵ over the task's dense blocks
  bool has_dense_grad = false;
  Uninitialised<uint8_t> parts;            // operands of products in bf16 parts or int16, Kernels::parts_bytes of them
  int pending = 0;                         // blocks among them whose Σ g ŵ is still to be added
  bool far = false, pending_far = true;    // whether all pairs of the block are, and of all those
  std::vector<float> scaled;               // [block][group] u_i g_ij / s
  int skip_screens = 0;                    // blocks still taken to be dense, as the one before was
  std::vector<float> class_sum;            // [padded D] Σ ŵ_j of the task; as long as an int8 row is padded
  std::vector<uint32_t> candidates;        // [block][panels] bits
  Uninitialised<int32_t> pairs;            // [block][group] and a few more: the candidates as a list
  std::vector<uint8_t> own_tiles;          // [strips][panels] tiles that hold an own class
  std::vector<float> below, below_weight;  // [group] sums of one block, before they go to double
  std::vector<float> best;                 // [group] the best screened cosine of one block, its row in the low bits
  std::vector<float> raw;                  // [block][padded D] Σ u g x̂ of the backward
  std::vector<float> converted;            // [block][D] rows of a half-precision weight as fp32
};

// The gradient of a row of w that an optimizer takes: scale·raw + along·w.
struct StepGradient {
  const float* raw;
  float scale, along;
};

// torch.optim.SGD's rule.
struct SgdRule {
  float lr, momentum;
  float undamped;  // 1 − dampening, and 1 in the first step
  float weight_decay;
  bool nesterov;
};

// torch.optim.AdamW's rule of one step.
struct AdamWRule {
  float keep;                    // 1 − lr·weight_decay
  float new_mean;                // 1 − β₁
  float old_square, new_square;  // β₂, 1 − β₂
  float step_size;               // lr / (1 − β₁ᵗ)
  float unbias_root;             // 1 / √(1 − β₂ᵗ)
  float eps;
};

struct Kernels {
  const char* name;
  int panel_samples;  // samples in a panel
  int strip_rows;     // classes in a register tile
  int column_words;   // floats' worth of memory a panel takes for each feature, where it is to be multiplied
  // Size of Workspace::parts.
  int64_t (*parts_bytes)(int64_t padded_d);

  // Unit rows of a panel: fills the layouts of Group, `fixed_point` only where it is not null. `rows` holds x on entry,
  // x̂ on return.
  void (*pack_panel)(float* rows, int count, int d, int padded_d, int32_t* fixed_point, double* norms);

  // Group::columns of a panel, from its unit rows.
  void (*pack_columns)(const float* rows, int count, int d, int padded_d, float* columns);

  // The same for the int8 screen, from unit rows; null where the instruction set has none that is faster than int16.
  void (*pack_int8)(const float* rows, int count, int d, int padded_d, const Int8Samples& out);

  // One block of classes against one group: sums, active pairs, Σ g ŵ. Returns Segment::count.
  int64_t (*forward_block)(const Rules&, const Group&, const Block&, Task&, Workspace&);

  // After the last block of a task: what its dense blocks added joins RowSums::grad.
  void (*flush_dense_grad)(const Group&, RowSums&, Workspace&);

  // raw[rows][padded D] += (tile[rows][count] times u[count]) · x̂ of the group, with `columns` as pack_features leaves
  // them. Of the block it reads the number of rows, and fetches what `next` points to.
  void (*add_dense)(const Rules&, const float* tile, int tile_stride, const float* u, const Block& block,
                    const float* columns, int count, int padded_d, float* raw, Workspace&);
  // `rows` x̂ [count][padded D] in the order that add_dense reads, in the memory of `columns` of as many panels.
  void (*pack_features)(const float* rows, int count, int padded_d, float* columns);

  // The same of far pairs, whose coefficients stand in the arena: `words` [rows][far_words(count)], with `samples` as
  // pack_far makes them, far_words(count)·padded_d of them. Null where products of fp32 are as fast.
  void (*add_far)(const int32_t* words, const float* u, const Block& block, const int32_t* samples, int count,
                  int padded_d, float* raw, Workspace&);
  void (*pack_far)(const float* rows, int count, int padded_d, int32_t* samples);

  float (*dot)(const float*, const float*, int d);
  void (*axpy)(float scale, const float* x, float* y, int d);  // y += scale·x
  // y += Σ scale·x of one to four rows in turn, y read and written once; `first`: y holds nothing yet.
  void (*add_rows)(int count, const float* scale, const float* const* x, bool first, float* y, int padded_d);
  // out = scale·raw + along·w, the tangent of (8)
  void (*combine)(float scale, const float* raw, float along, const float* w, float* out, int d);
  void (*zero)(float* out, int d);  // like combine, past the caches where that is possible
  void (*finish_stores)();          // after the last combine or zero, so that other threads see them
  void (*intra)(const Hyper&, float cosine, float* p);  // (3) without s

  // One step on a row of w and of its state, in place; `buffer` is null without momentum.
  void (*sgd)(const SgdRule&, const StepGradient&, float* w, float* buffer, int d);
  void (*adamw)(const AdamWRule&, const StepGradient&, float* w, float* mean, float* square, int d);
};

// Makes Group::columns unless that is done: dense blocks ask before they read them. Not compiled for an instruction
// set, as the standard library has part in it.
void make_columns(const Group& group);

// Of the instruction sets this build holds, those that this CPU runs, best first.
std::vector<const Kernels*> usable_kernels();
// The first of them, or the one that the environment variable SFACE_CPU_ISA names.
const Kernels& kernels();

}  // namespace sface
