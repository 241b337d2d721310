// Rows of ∂w that a forward makes for the backward that it expects, equation (8).
//
// The forward has a class's row of w and most of its samples in the caches when it knows the class's active pairs; the
// backward would read them again. The rows are bit for bit those of native_grad_weight.
#pragma once

#include "ops.h"
#include "problem.h"

namespace sface {

// What has become of a row.
enum class Early : uint8_t {
  kLater,  // the backward makes it, as all rows of its block
  kMade,
  kZeros,  // it has no gradient: the backward writes the zeros, where no reads are in their way
};

class EarlyRows {
 public:
  // `grad` [C, D] and `rows` [C], an Early each, are written; `upstream` is that of the sum or the mean of the losses.
  EarlyRows(const Call& call, const Tensor& grad, const Tensor& rows, double upstream, bool mean);

  // Those of a block, from its active pairs as they stand in the arena. `count` as in Segment.
  void make(const Block& block, const int32_t* words, int64_t count, Workspace& work) const;

 private:
  const Call& call_;
  float* grad_;
  Early* rows_;
  float u_;        // of every sample that counts
  bool expected_;  // whether the backward will take such rows
};

}  // namespace sface
