// The loss's gradient in the logits: weight * (softmax - one-hot), exactly 0 in rows of weight 0, even if a logit there is NaN.
//
// Sizes: logits, g [C,W]; lse, target, weight [C], lse over all slices, target counted from this slice's first column.
// A thread makes CPT neighbouring columns of a row.
  const int W = logits_shape[1], row = thread_position_in_grid.y;
  const int begin = thread_position_in_grid.x * CPT, end = begin + CPT < W ? begin + CPT : W;
  const size_t start = (size_t)row * W;
  const float label_weight = weight[row], shift = lse[row];
  const int t = target[row];
  if (label_weight == 0.0f) {
    LANES for (int i = begin; i < end; ++i) ST(T, g, start + i, 0.0f);
  } else {
    LANES for (int i = begin; i < end; ++i) {
      ST(T, g, start + i, (fexp2((LD(logits, start + i) - shift) * LOG2E) - (i == t ? 1.0f : 0.0f)) * label_weight);
    }
  }
