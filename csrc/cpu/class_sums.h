// The sums Σ_i u_i g_ij x̂_i of equation (8), block of classes by block, from the list of active pairs that a forward
// left. backward.cpp makes rows of ∂w of them, head_step.cpp steps of an optimizer.
#pragma once

#include <utility>

#include "ops.h"
#include "partials.h"
#include "problem.h"

namespace sface {

// The upstream gradients u_i of the rows, times a scale.
struct Upstream {
  std::vector<float> u;    // [N], 0 for rows that do not count
  std::vector<float> own;  // [N], u_i times the own class's weight −p_i / s
  bool poisoned = false;   // a NaN row is active with every class

  Upstream(const Problem& problem, const Tensor& grad_row, const Tensor& target_weight, float scale);
};

// Which ways the blocks of a forward went, of those that are recorded.
struct Ways {
  bool dense, far, recompute;
};

// What a forward saved, and the upstream gradients of its rows. Stays where it was made: its parts refer to each other.
struct SavedPairs {
  const Problem problem;
  const Kernels& kernels;
  const int32_t* const words;  // the arena
  const Ways ways;
  const Segment* const segments;  // [groups][blocks]
  const float* const inv_norm;    // [C]
  const Upstream up;
  const Samples samples;
  const Rules rules;
  const Call call;
  Uninitialised<float> columns;        // x̂ as Kernels::pack_features writes it, where some block went the dense way
  Uninitialised<int32_t> far_columns;  // x̂ as Kernels::pack_far does, where some block has far pairs

  // Raises unless everything fits.
  SavedPairs(const Tensor& x, const Tensor& w, const Tensor& target, const Tensor& grad_row, const Hyper& hyper,
             const Tensor& inv_norm_, const Tensor& target_weight, const Tensor& arena, const Tensor& segments_,
             float scale);
  SavedPairs(const SavedPairs&) = delete;
  float* columns_of(const Group& group) const;  // the part of a group
  int32_t* far_columns_of(const Group& group) const;
};

// The sums of the rows of one block, in Workspace::raw.
class RawRows {
 public:
  RawRows(Workspace& work, int64_t padded_d) : memory_(work.raw.data()), padded_d_(padded_d) {}

  // Starts the next block.
  void begin() { std::fill(touched_, touched_ + kBlockClasses, false); }

  // The sum of one row `[padded D]`, null where nothing was added.
  float* row(int row) { return touched_[row] ? memory_ + row * padded_d_ : nullptr; }

  // Where it is to be added to, for whoever does; `first`: nothing was added, and it holds nothing yet.
  struct Sum {
    float* raw;
    bool first;
  };
  Sum touch(int row) { return {memory_ + row * padded_d_, !std::exchange(touched_[row], true)}; }

  // All rows, zeros where nothing was added, to add to.
  float* touch_all() {
    for (int row = 0; row < kBlockClasses; ++row)
      if (const auto [raw, first] = touch(row); first) std::memset(raw, 0, sizeof(float) * padded_d_);
    return memory_;
  }

 private:
  float* memory_;
  int64_t padded_d_;
  bool touched_[kBlockClasses];
};

// Samples that are added to the sum of one row together.
struct Run {
  static constexpr int kMost = 4;
  int row = 0, count = 0;
  float scale[kMost];
  const float* x[kMost];
};

// Adds to the sums of a block what one forward left for it.
class BlockSums {
 public:
  BlockSums(const SavedPairs& saved, Workspace& work, RawRows& rows) : saved_(saved), work_(work), rows_(rows) {}

  void add_block(int64_t b) {
    for (int64_t g = 0; g < saved_.problem.groups; ++g) add_segment(g, b);
  }

 private:
  void add_segment(int64_t g, int64_t b);
  void add(const Block& block, Run& run);
  void add(const Block& block, int row, int64_t sample, float scale, Run& run);
  void add_pairs(const Group& group, const Block& block, const int32_t* words, int64_t count);
  // What a record of `count` says, from the words that it points to.
  void add_record(const Group& group, Block& block, int64_t count, const int32_t* words);
  int64_t recompute(const Group& group, Block block);  // returns the count of its record, whose words are `again_`

  const SavedPairs& saved_;
  Workspace& work_;
  RawRows& rows_;
  std::vector<OwnClass> own_;
  std::vector<int32_t> again_;        // the arena of a block that is computed again
  std::optional<SampleSums> unread_;  // what the forward of such a block adds up
};

enum class Order { kForwards, kBackwards };

// body(next_block) on each of PyTorch's threads, as for_each_worker; next_block() hands out blocks in stretches, the
// first or the last one first.
template <typename Body>
void for_each_block(int64_t blocks, Order order, const Body& body) {
  constexpr int64_t kTasks = 256, kMostBlocks = 16;  // several tasks for each of many cores
  const int64_t blocks_each = std::clamp<int64_t>(blocks / kTasks, 1, kMostBlocks);
  const int64_t tasks = ceil_div(blocks, blocks_each);
  for_each_worker(tasks, [&](auto next_task) {
    int64_t next = 0, end = 0;
    body([&] {
      if (next == end) {
        const int64_t task = next_task();
        const int64_t stretch = order == Order::kBackwards && task < tasks ? tasks - 1 - task : task;
        next = std::min(blocks, stretch * blocks_each);
        end = std::min(blocks, next + blocks_each);
      }
      return next < end ? next++ : blocks;
    });
  });
}

// A row of ∂w as a sum of two: the tangent of (8).
struct RowGradient {
  float scale;
  const float* raw;
  float along;
  const float* w;
  float factor;  // of the sum: not 1 where w is the shortened row
};

// That of a row [D] of w from its raw sum, which may change; `scale` is what the sum lacks.
RowGradient row_gradient(const Kernels& kernels, float* raw, const WeightRow& row, int d, float scale);
RowGradient row_gradient(const SavedPairs& saved, float* raw, int64_t cls, float scale, std::vector<float>& converted);

// A row of ∂w [D] from its raw sum; null: there is none.
void write_row(const SavedPairs& saved, float* raw, int64_t cls, float scale, std::vector<float>& converted,
               float* out);

}  // namespace sface
