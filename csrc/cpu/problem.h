// How a call is cut into work, the same in the forward and the backward and for any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <mutex>

#include "ops.h"

namespace sface {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline float clamp_cosine(float c) { return c < -1 ? -1 : c > 1 ? 1 : c; }

// A sample and its class.
struct Labelled {
  int64_t cls;
  int64_t sample;
};

// ŵ = w·inv_norm, and 1/‖w_j‖ = inv_norm·factor.
struct WeightRow {
  const float* w;
  float inv_norm;
  float factor;  // 1, or kShortening where w is the shortened row
};

// Raises unless `t` is what a kernel may read through a pointer.
void check_tensor(const char* name, const Tensor& t, ScalarType dtype, const std::vector<int64_t>& sizes);

struct Problem {
  Tensor x, w, target;
  int64_t n, c, d, padded_d;
  int64_t groups, blocks;
  int64_t ranges;  // the classes are cut into this many ranges of blocks; a task is a range and a group
  ScalarType weight_type;
  std::vector<Labelled> labelled;  // samples with a class, sorted by class

  // Raises unless the three fit each other and hold a class and a feature at least.
  Problem(const Tensor& x_, const Tensor& w_, const Tensor& target_);

  int64_t range_begin(int64_t range) const { return blocks * range / ranges; }  // first block
  int64_t group_first(int64_t group) const { return group * kGroupSamples; }
  int64_t group_count(int64_t group) const { return std::min<int64_t>(kGroupSamples, n - group_first(group)); }
  int block_rows(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kBlockClasses, c - block * kBlockClasses));
  }
  bool float_weight() const { return weight_type == ScalarType::Float; }
  const int64_t* codes() const { return codes_; }

  // Rows of w as fp32: in place for a float weight, else converted into `converted`.
  const float* weight_rows(int64_t first, int64_t count, std::vector<float>& converted, int64_t* stride) const;
  // A row of w of which the forward left this entry of inv_norm, shortened where that says so.
  WeightRow weight_row(int64_t cls, float inv_norm, std::vector<float>& converted) const;
  // The samples of a group with their class in a block.
  void own_classes(int64_t group, int64_t block, std::vector<OwnClass>& out) const;
  // A block against a group: its place and own classes, held in `own`; the rows of w are the caller's to set.
  Block block_of(int64_t group, int64_t block, std::vector<OwnClass>& own) const;
  // Starts to fetch a row of w into the L2 cache.
  void fetch_row(int64_t cls) const {
    const int64_t size = weight_type == ScalarType::Float ? 4 : 2, from = cls * weight_stride_ * size;
    for (int64_t byte = 0; byte < d * size; byte += 64)
      __builtin_prefetch(static_cast<const char*>(weight_) + from + byte, 0, 2);
  }
  bool ignored(int64_t sample) const { return codes()[sample] == kIgnored; }
  // Samples that are not ignored; 1 avoids 0/0.
  int64_t counted() const { return std::max<int64_t>(n - std::count(codes(), codes() + n, kIgnored), 1); }

 private:
  // asked for once: each question to a tensor is a call into PyTorch
  const void* weight_;
  int64_t weight_stride_;
  const int64_t* codes_;
};

// Unit rows of every sample in the layouts that the kernels read.
struct Samples {
  int64_t padded_d;
  Uninitialised<float> rows;                      // [N][padded D]
  Uninitialised<float> columns;                   // [panels][padded D][Kernels::column_words]
  Uninitialised<int32_t> fixed_point;             // [panels][padded D / 2][panel]
  Uninitialised<int32_t> int8_words, int8_start;  // as in Int8Samples
  Uninitialised<float> int8_scale, int8_error;
  std::vector<uint32_t> participates;        // [panels], as in Group
  std::vector<double> norms;                 // [N], not finite where the row is not; may exceed the largest float
  std::vector<std::once_flag> columns_made;  // [groups]
  std::vector<Group> groups;

  // Which layouts beside the rows; unit rows alone are cheap.
  struct Layouts {
    bool fixed_point, int8;
  };
  Samples(const Problem& problem, const Kernels& kernels, Layouts layouts);
  float* row(int64_t sample) const { return rows.data.get() + sample * padded_d; }
  bool usable(int64_t sample) const { return is_finite(norms[sample]); }
};

// What stays the same through a call.
struct Call {
  const Problem& problem;
  const Kernels& kernels;
  const Rules& rules;
  const Samples& samples;
};

// What is known of the coefficients of the samples' own classes; 0 where nothing is.
struct OwnShares {
  float smallest = 0;  // as a share of s, no sample has less
  float visible = 0;   // the largest p_i / ‖x_i‖ times the smallest ‖x_i‖: what moves ∂x as much, in any row
};

// From −p_i / s of each sample.
OwnShares own_shares(const Problem& problem, const Kernels& kernels, const Samples& samples,
                     const float* target_weight);
Rules make_rules(const Hyper& hyper, int64_t d, const OwnShares& own);
// What a forward reads, whatever the own coefficients are.
Samples::Layouts layouts_of(const Hyper& hyper, int64_t d, const Kernels& kernels);
Workspace make_workspace(const Problem& problem, const Kernels& kernels);

// body(begin, end) on PyTorch's threads, over parts of [0, count). An exception would lose its text on its way through
// the C interface of PyTorch, so it goes around.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// Runs body(next_task) on each of PyTorch's threads; next_task() hands out 0 … count − 1, to whoever is free. Tasks own
// their results, so what comes out does not depend on which thread ran what.
//
// Why no lock is needed but those of SampleGrads and of Group::columns_made: a forward task alone writes its rows of
// Partials, its part of the arena and its segments, and that of the first group also inv_norm, class_sum and
// classes_finite of its classes; a backward task alone writes its rows of ∂w.
// Scratch belongs to a thread. Tasks share `next`, which is atomic and orders nothing, and what was complete before
// parallel_for; whoever reads their results does so after it returned, which waits for every thread. (ThreadSanitizer
// does not know OpenMP's barriers, so it cannot check this.)
template <typename Body>
void for_each_worker(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(count, torch::stable::get_num_threads()), 1,
               [&](int64_t, int64_t) { body([&] { return next.fetch_add(1, std::memory_order_relaxed); }); });
}

}  // namespace sface
