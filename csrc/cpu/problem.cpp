// Cutting a call into tasks, and the samples' layouts.
#include "problem.h"

namespace sface {

namespace {

// Each range of classes keeps a partial Σ g ŵ [N, D]: as many ranges as fit beside the lists into what a call may hold,
// but 4, so that there is something to share. Powers of two where N and D are: so are most numbers of cores.
constexpr int64_t kPartialBytes = 16 << 20;
constexpr int64_t kMinRanges = 4, kMaxRanges = 64;
constexpr int64_t kMaxRows = INT32_MAX - kGroupSamples;  // a tile's places past the last row are numbered in int too
constexpr int64_t kMaxFeatures = 1 << 24;                // its products with a panel or a block are taken in int

// A steeper one turns the error of an int8 cosine into too much of a coefficient, that of an int16 one where each far
// coefficient counts.
constexpr double kSteepest = 160;
// With fewer features products in fp32 are as fast.
constexpr int64_t kFarMinFeatures = 128;
// What other roundings may move of a far coefficient's entry, as a share of it.
constexpr double kFarRounding = 1.0 / 512;

// fp32 rounding in a rescored cosine: of norms and products, and of a sum in at least 8 partial sums over D
double rounding_slack(int64_t d) { return 2e-6 + d / 8.0 * 0x1p-24; }

std::string list(const int64_t* values, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << t.scalar_type() << " " << list(t.sizes().data(), t.dim()) << " with strides "
       << list(t.strides().data(), t.dim()) << (t.is_cpu() ? "" : " on another device");
  return text.str();
}

const Tensor& matrix(const char* name, const Tensor& t) {
  if (t.dim() != 2) fail(name, ": expected two dimensions, got ", describe(t));
  return t;
}

}  // namespace

void check_tensor(const char* name, const Tensor& t, ScalarType dtype, const std::vector<int64_t>& sizes) {
  const bool fits = t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() &&
                    std::equal(sizes.begin(), sizes.end(), t.sizes().begin(), t.sizes().end());
  if (!fits)
    fail(name, ": expected contiguous ", dtype, " ", list(sizes.data(), sizes.size()), " on the CPU, got ",
         describe(t));
}

Problem::Problem(const Tensor& x_, const Tensor& w_, const Tensor& target_)
    : x(matrix("x", x_)),
      w(matrix("w", w_)),
      target(target_),
      n(x.size(0)),
      c(w.size(0)),
      d(x.size(1)),
      padded_d(ceil_div(d, kFeaturePad) * kFeaturePad),
      groups(ceil_div(n, kGroupSamples)),
      blocks(ceil_div(c, kBlockClasses)),
      weight_type(w.scalar_type()),
      weight_(w.const_data_ptr()),
      weight_stride_(w.stride(0)),
      codes_(nullptr) {
  check_tensor("x", x, ScalarType::Float, {n, d});
  check_tensor("target", target, ScalarType::Long, {n});
  codes_ = target.const_data_ptr<int64_t>();
  check(weight_type == ScalarType::Float || weight_type == ScalarType::Half || weight_type == ScalarType::BFloat16,
        "w: expected float32, float16 or bfloat16, got ", weight_type);
  if (!(w.is_cpu() && w.size(1) == d && (d == 1 || w.stride(1) == 1)))
    fail("w: expected [C, ", d, "] with contiguous rows on the CPU, got ", describe(w));
  if (c == 0 || d == 0) fail("w: expected at least one class and one feature, got ", describe(w));
  check(c <= kMaxRows && n <= kMaxRows && d <= kMaxFeatures, "sizes: expected at most ", kMaxRows,
        " classes and samples and 2^24 features, got ", c, ", ", n, ", ", d);
  const int64_t partial = std::max<int64_t>(1, n * padded_d * static_cast<int64_t>(sizeof(float)));
  ranges = std::min(blocks, std::clamp(kPartialBytes / partial, kMinRanges, kMaxRanges));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t code = codes()[i];
    check(code < c, "target: expected classes below ", c, ", got ", code);
    if (code >= 0) labelled.push_back({code, i});
  }
  std::sort(labelled.begin(), labelled.end(),
            [](const Labelled& a, const Labelled& b) { return a.cls != b.cls ? a.cls < b.cls : a.sample < b.sample; });
}

const float* Problem::weight_rows(int64_t first, int64_t count, std::vector<float>& converted, int64_t* stride) const {
  const int64_t from = weight_stride_;
  if (float_weight()) {
    *stride = from;
    return static_cast<const float*>(weight_) + first * from;
  }
  converted.resize(kBlockClasses * d);
  const auto convert = [&](const auto* data) {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < d; ++k) converted[r * d + k] = static_cast<float>(data[(first + r) * from + k]);
  };
  if (weight_type == ScalarType::Half) {
    convert(static_cast<const Half*>(weight_));
  } else {
    convert(static_cast<const BFloat16*>(weight_));
  }
  *stride = d;
  return converted.data();
}

WeightRow Problem::weight_row(int64_t cls, float inv_norm, std::vector<float>& converted) const {
  int64_t stride;
  const float* row = weight_rows(cls, 1, converted, &stride);
  if (!(inv_norm < 0)) return {row, inv_norm, 1};
  converted.resize(kBlockClasses * d);
  for (int64_t k = 0; k < d; ++k) converted[k] = row[k] * kShortening;
  return {converted.data(), -inv_norm, kShortening};
}

void Problem::own_classes(int64_t group, int64_t block, std::vector<OwnClass>& out) const {
  out.clear();
  const int64_t first = block * kBlockClasses, end = first + kBlockClasses;
  const auto begin = std::lower_bound(labelled.begin(), labelled.end(), first,
                                      [](const Labelled& t, int64_t cls) { return t.cls < cls; });
  const int64_t sample = group_first(group);
  for (auto t = begin; t != labelled.end() && t->cls < end; ++t)
    if (t->sample >= sample && t->sample < sample + kGroupSamples)
      out.push_back({static_cast<int32_t>(t->sample - sample), static_cast<int32_t>(t->cls - first)});
}

Block Problem::block_of(int64_t group, int64_t block, std::vector<OwnClass>& own) const {
  own_classes(group, block, own);
  Block out{};
  out.first = block * kBlockClasses;
  out.count = block_rows(block);
  out.own = own.data();
  out.own_count = static_cast<int>(own.size());
  return out;
}

Samples::Samples(const Problem& problem, const Kernels& kernels, Layouts layouts)
    : padded_d(problem.padded_d),
      rows(problem.n * padded_d),
      norms(problem.n),
      columns_made(problem.groups),
      groups(problem.groups) {
  const int64_t panel = kernels.panel_samples, d = problem.d;
  const int64_t group_panels = kGroupSamples / panel, panels = group_panels * problem.groups;
  const int64_t panel_columns = padded_d * kernels.column_words;
  columns = Uninitialised<float>(panels * panel_columns);
  fixed_point = Uninitialised<int32_t>(layouts.fixed_point ? panels * panel * (padded_d / 2) : 0);
  const bool int8 = layouts.int8 && kernels.pack_int8 != nullptr;
  const int64_t int8_words_each = int8 ? ceil_div(d, kInt8Pad) * kInt8Pad / 4 : 0, int8_each = int8 ? 1 : 0;
  int8_words = Uninitialised<int32_t>(panels * panel * int8_words_each);
  int8_start = Uninitialised<int32_t>(panels * panel * int8_each);
  int8_scale = Uninitialised<float>(panels * panel * int8_each);
  int8_error = Uninitialised<float>(panels * panel * int8_each);
  const auto int8_samples = [&](int64_t p) -> Int8Samples {
    if (!int8) return {};
    return {int8_words.data.get() + p * panel * int8_words_each, int8_start.data.get() + p * panel,
            int8_scale.data.get() + p * panel, int8_error.data.get() + p * panel};
  };
  participates.assign(panels, 0);
  for (int64_t g = 0; g < problem.groups; ++g) {
    const int64_t first = problem.group_first(g), count = problem.group_count(g), first_panel = g * group_panels;
    groups[g] = {
        .first = static_cast<int>(first),
        .count = static_cast<int>(count),
        .panels = static_cast<int>(ceil_div(count, panel)),
        .d = static_cast<int>(d),
        .padded_d = static_cast<int>(padded_d),
        .rows = row(first),
        .columns = columns.data.get() + first_panel * panel_columns,
        .columns_made = &columns_made[g],
        .fixed_point = layouts.fixed_point ? fixed_point.data.get() + first_panel * panel * (padded_d / 2) : nullptr,
        .int8 = int8_samples(first_panel),
        .int8_worst_error = 0,
        .participates = participates.data() + first_panel};
  }
  const float* x = problem.x.const_data_ptr<float>();
  parallel_for(ceil_div(problem.n, panel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * panel, count = std::min(panel, problem.n - first);
      for (int64_t i = first; i < first + count; ++i) {
        if (problem.ignored(i)) {  // whatever it holds must change no threshold and no way of computing
          std::memset(row(i), 0, sizeof(float) * d);
        } else {
          std::memcpy(row(i), x + i * d, sizeof(float) * d);
        }
      }
      kernels.pack_panel(row(first), static_cast<int>(count), static_cast<int>(d), static_cast<int>(padded_d),
                         layouts.fixed_point ? fixed_point.data.get() + p * panel * (padded_d / 2) : nullptr,
                         &norms[first]);
      if (int8)
        kernels.pack_int8(row(first), static_cast<int>(count), static_cast<int>(d), static_cast<int>(padded_d),
                          int8_samples(p));
      for (int64_t i = 0; i < count; ++i)
        if (usable(first + i) && !problem.ignored(first + i)) participates[p] |= 1u << i;
    }
  });
  if (int8)
    for (Group& group : groups)
      group.int8_worst_error = *std::max_element(group.int8.error, group.int8.error + group.count);
}

void make_columns(const Group& group) {
  std::call_once(*group.columns_made, [&] {
    const Kernels& kernels = sface::kernels();
    const int panel = kernels.panel_samples;
    for (int first = 0; first < group.count; first += panel) {
      const int64_t at = static_cast<int64_t>(first) * group.padded_d;
      kernels.pack_columns(group.rows + at, std::min(panel, group.count - first), group.d, group.padded_d,
                           group.columns + at / panel * kernels.column_words);
    }
  });
}

OwnShares own_shares(const Problem& problem, const Kernels& kernels, const Samples& samples,
                     const float* target_weight) {
  OwnShares shares{.smallest = 1};
  double shortest = std::numeric_limits<double>::max(), largest = 0;
  for (int64_t i = 0; i < problem.n; ++i) {
    if (problem.ignored(i) || !samples.usable(i)) continue;
    const float p = problem.codes()[i] >= 0 ? -target_weight[i] : 0;
    const double length = std::max<double>(samples.norms[i], kNormEps);
    shortest = std::min(shortest, length);
    largest = std::fmax(largest, p / length);
    shares.smallest = std::fmin(shares.smallest, p);
  }
  if (kernels.add_far) shares.visible = static_cast<float>(largest * shortest);
  return shares;
}

Samples::Layouts layouts_of(const Hyper& hyper, int64_t d, const Kernels& kernels) {
  const Rules rules = make_rules(hyper, d, {});
  return {.fixed_point = rules.screen || kernels.add_far, .int8 = rules.int8};
}

Rules make_rules(const Hyper& hyper, int64_t d, const OwnShares& own) {
  Rules rules{};
  rules.hyper = hyper;
  rules.slope_log2 = hyper.k_inter * 1.44269504088896340736f;
  rules.keep_above = hyper.filter_eps;
  const double k = hyper.k_inter, b = hyper.b;
  // the angle at which the sigmoid of (4) reaches a share
  const auto angle_of = [&](double share) { return share > 0 ? b + std::log((1 - share) / share) / k : INFINITY; };
  // rounding to int16 moves a cosine by at most this: |x̂·f| + |e·ŵ| + |e·f| with |e|, |f| ≤ √D/2 (docs/math.md)
  const double bound = (std::sqrt(static_cast<double>(d)) + d / (4.0 * kScale)) / kScale + rounding_slack(d);
  const bool drops = hyper.filter_eps > 0x1p-126f;  // no coefficient is computed to be less
  double angle = angle_of(drops ? std::min<double>(hyper.filter_eps, kCandidateShare) : 0);
  const auto threshold_of = [&](double at) { return at < M_PI ? std::cos(std::max(at, 0.0)) - bound : -2.0; };
  if (threshold_of(angle) <= -1 && d >= kFarMinFeatures && k <= kSteepest) {
    // every pair is active: where a screened cosine and coarse products move no row of ∂x by more than 2⁻²⁴ of what
    // the own classes do (docs/math.md, 3)
    angle = angle_of(std::min(own.visible * 0x1p-24 / (bound * (1 + k) + kFarRounding), kCandidateShare));
    rules.far = threshold_of(angle) > -1;
  }
  const double threshold = threshold_of(angle);
  rules.screen = threshold > -1;
  rules.candidate_min = rules.screen ? static_cast<int32_t>(std::floor(threshold * kScale * kScale)) : 0;
  // where its series is not accurate, the weight must be below 2⁻⁶⁰; that of far pairs, within 1 %, below 2⁻¹¹⁰
  const double far_exponent = k * (std::acos(rules.far ? -0.6 : -0.5) - b) / std::log(2.0);
  rules.cheap_below = threshold + 2 * bound <= 0.26 && far_exponent > (rules.far ? 110 : 60);
  rules.active_cosine = static_cast<float>(std::cos(std::max(angle, 0.0)) - rounding_slack(d) - 1e-6);
  rules.int8 = rules.screen && !rules.far && rules.cheap_below && d >= kInt8MinFeatures && d <= kInt8MaxFeatures &&
               k <= kSteepest;
  // Two parts of each number lose 3·2⁻¹⁶ of a product at most, and so move a cosine by as much and a coefficient by k
  // times that; one part loses 2⁻⁸ + 2⁻¹⁸. The share below which this is no more than 2⁻²⁴ of any sample's own class
  // (docs/math.md, 3).
  constexpr double kTwoParts = 3.0 / 65536, kOnePart = 1.0 / 256 + 1.0 / 262144;
  const double far = rules.screen ? 0 : own.smallest * 0x1p-24 / (kTwoParts * (1 + k) + kOnePart);
  const double far_angle = far > 0 ? b + std::log((1 - far) / far) / k : M_PI;
  rules.far_share = static_cast<float>(far);
  rules.far_cosine = far_angle < M_PI ? static_cast<float>(std::cos(std::max(far_angle, 0.0)) - kTwoParts) : -2.0f;
  return rules;
}

Workspace make_workspace(const Problem& problem, const Kernels& kernels) {
  Workspace work;
  const int64_t padded = problem.padded_d, panels = kGroupSamples / kernels.panel_samples;
  work.fixed_point.resize(kBlockClasses * padded / 2);
  work.inv_norm.resize(kBlockClasses);
  work.int8 = Uninitialised<uint8_t>(kBlockClasses * (problem.d + kInt8Pad));
  work.int8_scale.resize(kBlockClasses);
  work.int8_error.resize(kBlockClasses);
  work.best.resize(kGroupSamples);
  work.short_rows = Uninitialised<float>(kBlockClasses * problem.d);
  work.tile.resize((kBlockClasses + 1) * kGroupSamples);  // one more: a strip may read past the last sample
  work.packed.resize(kBlockClasses * kernels.panel_samples);
  work.dense_grad = Uninitialised<float>(padded * kGroupSamples);
  work.scaled.resize(kBlockClasses * kGroupSamples);
  work.parts = Uninitialised<uint8_t>(kernels.parts_bytes(padded));
  work.class_sum.assign(ceil_div(problem.d, kInt8Pad) * kInt8Pad, 0);
  work.candidates.resize(kBlockClasses * panels);
  work.pairs = Uninitialised<int32_t>((kBlockClasses + 1) * kGroupSamples);
  work.own_tiles.assign(kBlockClasses / kernels.strip_rows * panels, 0);
  work.below.resize(kGroupSamples);
  work.below_weight.resize(kGroupSamples);
  work.raw.resize(kBlockClasses * padded);
  return work;
}

}  // namespace sface
