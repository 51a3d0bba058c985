// The loss's gradient in the logits: weight * (softmax - one-hot), exactly 0 in rows of weight 0, even if a logit there is NaN. With
// ENTROPY, the loss holds -beta times the Renyi entropy H of order 1 + a, whose gradient is
// beta (1 + a) p ((exp(a (log p + H)) - 1) / a).
//
// Sizes: logits, g [C,W]; lse, entropy, target, weight [C], lse and H over all slices, target counted from this slice's first column;
// numbers [8] = a, beta (1 + a), .... A thread makes CPT neighbouring columns of a row.
  const int W = logits_shape[1], row = thread_position_in_grid.y;
  const int begin = thread_position_in_grid.x * CPT, end = begin + CPT < W ? begin + CPT : W;
  const size_t start = (size_t)row * W;
  const float label_weight = weight[row], shift = lse[row], H = entropy[ENTROPY ? row : 0], a = numbers[0], strength = numbers[1];
  const int t = target[row];
  if (label_weight == 0.0f) {
    LANES for (int i = begin; i < end; ++i) ST(T, g, start + i, 0.0f);
  } else {
    LANES for (int i = begin; i < end; ++i) {
      const float log_p = LD(logits, start + i) - shift, confident = ENTROPY ? strength * k_tilt(log_p, log_p + H, a) : 0.0f;
      ST(T, g, start + i, (fexp2(log_p * LOG2E) - (i == t ? 1.0f : 0.0f) + confident) * label_weight);
    }
  }
