// One optimizer step on a row of w and of its state, in place. Included per instruction set, after vectors.inl.

// The first `count` of a vector's lanes, the others 0.
SFACE_INLINE F32 load_some(const float* p, int count) {
  F32 v{};
  std::memcpy(&v, p, sizeof(float) * count);
  return v;
}
SFACE_INLINE void store_some(float* p, F32 v, int count) { std::memcpy(p, &v, sizeof(float) * count); }

// So many rows on, what a step reads and writes is fetched: it waits for memory alone (N=128, C=85,742, D=512: a step
// of SGD with momentum took 27 ms without, 20 with 4, 16 or 48). Past the last row a fetch does nothing.
constexpr int64_t kRowsAhead = 16;

// move(rows) on vectors of each of `rows`, whole ones and a last part.
template <int kRows, typename Move>
SFACE_INLINE void for_lanes(float* const (&rows)[kRows], const float* raw, int d, const Move& move) {
  F32 lanes[kRows];
  int k = 0;
  for (; k + kLanes <= d; k += kLanes) {
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(rows[r] + k + kRowsAhead * d, 1, 2);
    for (int r = 0; r < kRows; ++r) lanes[r] = load(rows[r] + k);
    move(load(raw + k), lanes);
    for (int r = 0; r < kRows; ++r) store(rows[r] + k, lanes[r]);
  }
  if (k == d) return;
  for (int r = 0; r < kRows; ++r) lanes[r] = load_some(rows[r] + k, d - k);
  move(load_some(raw + k, d - k), lanes);
  for (int r = 0; r < kRows; ++r) store_some(rows[r] + k, lanes[r], d - k);
}

void sgd(const SgdRule& rule, const StepGradient& gradient, float* w, float* buffer, int d) {
  const auto gradient_of = [&](F32 raw, F32 row) {
    return gradient.scale * raw + gradient.along * row + rule.weight_decay * row;
  };
  if (buffer == nullptr) {
    float* const rows[] = {w};
    for_lanes(rows, gradient.raw, d, [&](F32 raw, F32* row) { row[0] -= rule.lr * gradient_of(raw, row[0]); });
    return;
  }
  // the step is a sum of gradient and buffer either way: a branch in the loop would cost more
  const float of_gradient = rule.nesterov ? 1 : 0, of_buffer = rule.nesterov ? rule.momentum : 1;
  float* const rows[] = {w, buffer};
  for_lanes(rows, gradient.raw, d, [&](F32 raw, F32* row) {
    const F32 g = gradient_of(raw, row[0]);
    row[1] = rule.momentum * row[1] + rule.undamped * g;
    row[0] -= rule.lr * (of_gradient * g + of_buffer * row[1]);
  });
}

void adamw(const AdamWRule& rule, const StepGradient& gradient, float* w, float* mean, float* square, int d) {
  float* const rows[] = {w, mean, square};
  for_lanes(rows, gradient.raw, d, [&](F32 raw, F32* row) {
    const F32 g = gradient.scale * raw + gradient.along * row[0];
    // as torch.lerp: from the nearer end, so that with β₁ = 0 nothing of the mean's rounding stays
    row[1] = rule.new_mean < 0.5f ? row[1] + rule.new_mean * (g - row[1]) : g - (1 - rule.new_mean) * (g - row[1]);
    row[2] = rule.old_square * row[2] + rule.new_square * (g * g);
    const F32 size = square_root(row[2]) * rule.unbias_root + rule.eps;
    row[0] = rule.keep * row[0] - rule.step_size * row[1] / size;
  });
}
