// What the tasks of a forward add up, each for its range of classes and its group of samples.
#pragma once

#include <mutex>
#include <optional>

#include "problem.h"

namespace sface {

// Σ_j g_ij ŵ_j of every sample.
//
// Ranges are added in their order, so that no thread changes a bit of the sum. With few threads, whoever ends a task
// adds what has its turn while it is in the cache, and another task takes that memory over. With many they would wait
// for each other: what is left is added at last, sample by sample, on all of them.
class SampleGrads {
 public:
  // What a task adds to: [group][padded D] sums, and [group] whether a row of them holds anything yet.
  struct Part {
    int64_t home;  // the range whose memory it is
    float* rows;
    uint8_t* touched;
  };

  SampleGrads(const Problem& problem, const Kernels& kernels)
      : problem_(problem),
        kernels_(kernels),
        homes_(problem.ranges * problem.groups),
        touched_(problem.ranges * problem.n, 0),
        total_(problem.n * problem.padded_d),
        total_touched_(problem.n, 0),
        queues_(problem.groups),
        at_once_(torch::stable::get_num_threads() <= kFewThreads) {
    for (Queue& queue : queues_) queue.homes.assign(problem.ranges, kNone);
  }

  // For a task that begins.
  Part take(int64_t range, int64_t group) {
    Queue& queue = queues_[group];
    const std::lock_guard<std::mutex> lock(queue.mutex);
    if (queue.free.empty()) {
      homes_[range * problem_.groups + group] = Uninitialised<float>(problem_.group_count(group) * problem_.padded_d);
      return part(range, group);
    }
    const int64_t home = queue.free.back();
    queue.free.pop_back();
    return part(home, group);
  }

  // From a task that has ended.
  void give(int64_t range, int64_t group, const Part& done) {
    Queue& queue = queues_[group];
    std::unique_lock<std::mutex> lock(queue.mutex);
    queue.homes[range] = done.home;
    if (!at_once_ || queue.adding) return;
    queue.adding = true;
    while (queue.next < problem_.ranges && queue.homes[queue.next] != kNone) {
      const Part next = part(queue.homes[queue.next], group);
      lock.unlock();
      for (int64_t i = 0; i < problem_.group_count(group); ++i) add(next, i, problem_.group_first(group) + i);
      lock.lock();
      queue.free.push_back(next.home);
      ++queue.next;
    }
    queue.adding = false;
  }

  // The sum of a sample [padded D], or null where it is 0, after all tasks. Each sample is for one thread alone.
  const float* finish(int64_t sample) {
    const int64_t group = sample / kGroupSamples;
    const Queue& queue = queues_[group];
    for (int64_t range = queue.next; range < problem_.ranges; ++range)
      add(part(queue.homes[range], group), sample % kGroupSamples, sample);
    return total_touched_[sample] ? total(sample) : nullptr;
  }

 private:
  static constexpr int kFewThreads = 8;
  static constexpr int64_t kNone = -1;

  // Of one group of samples.
  struct Queue {
    std::mutex mutex;
    std::vector<int64_t> homes;  // [ranges] of those that have ended, else kNone
    std::vector<int64_t> free;   // homes whose sums were added
    int64_t next = 0;            // the range whose turn it is
    bool adding = false;         // whether some thread adds it
  };

  Part part(int64_t home, int64_t group) {
    return {home, homes_[home * problem_.groups + group].data.get(),
            &touched_[home * problem_.n + problem_.group_first(group)]};
  }

  float* total(int64_t sample) { return total_.data.get() + sample * problem_.padded_d; }

  // Row i of a part to the sample's total.
  void add(const Part& part, int64_t i, int64_t sample) {
    if (!part.touched[i]) return;
    part.touched[i] = 0;
    float* const sum = total(sample);
    if (!total_touched_[sample]) std::memset(sum, 0, sizeof(float) * problem_.padded_d);
    total_touched_[sample] = 1;
    kernels_.axpy(1.0f, part.rows + i * problem_.padded_d, sum, static_cast<int>(problem_.padded_d));
  }

  const Problem& problem_;
  const Kernels& kernels_;
  std::vector<Uninitialised<float>> homes_;  // [ranges][groups] of [group][padded D], those that tasks took
  std::vector<uint8_t> touched_;             // [ranges][N]
  Uninitialised<float> total_;               // [N][padded D]
  std::vector<uint8_t> total_touched_;
  std::vector<Queue> queues_;
  bool at_once_;
};

// RowSums of samples, but for their gradients.
struct SampleSums {
  std::vector<double> inter, dropped;
  std::vector<float> hardest;
  std::vector<int32_t> hardest_class, best, best_class;

  explicit SampleSums(int64_t count)
      : inter(count, 0.0),
        dropped(count, 0.0),
        hardest(count, -2.0f),
        hardest_class(count, -1),
        best(count, INT32_MIN),
        best_class(count, -1) {}

  // From this one on.
  RowSums of(int64_t i) {
    return {&inter[i], &dropped[i], &hardest[i], &hardest_class[i], &best[i], &best_class[i], nullptr, nullptr};
  }
};

// Everything, per range of classes and sample, in rows of N padded to whole panels.
struct Partials {
  int64_t stride;
  SampleSums samples;                   // [ranges][stride]
  std::vector<float> class_sum;         // [ranges][padded D]
  std::vector<uint8_t> classes_finite;  // [ranges] whether every row of w is
  std::vector<Tally> tallies;           // [ranges][groups]
  std::optional<SampleGrads> grads;

  Partials(const Problem& problem, const Kernels& kernels, bool need_grad)
      : stride(ceil_div(problem.n, kernels.panel_samples) * kernels.panel_samples),
        samples(problem.ranges * stride),
        class_sum(problem.ranges * problem.padded_d, 0.0f),
        classes_finite(problem.ranges, true),
        tallies(problem.ranges * problem.groups) {
    if (need_grad) grads.emplace(problem, kernels);
  }

  // Those of one range, from a sample on, but for its gradient.
  RowSums sums(int64_t range, int64_t sample) { return samples.of(range * stride + sample); }
};

}  // namespace sface
