// For each row of logits: log sum exp, and the target's logit, 0 where the target is no column; both added to those of the slices of
// the row that came before, unless this is the FIRST.
//
// Sizes: logits [C,W]; target [C], counted from the slice's first column, maybe outside it; lse_before, picked_before, lse, picked [C].
// A threadgroup of SG simdgroups makes a row. The sum is taken relative to the largest logit, so it cannot overflow.
  const int W = logits_shape[1], row = thread_position_in_grid.y, l = thread_index_in_threadgroup;
  const size_t start = (size_t)row * W;
  threadgroup float shared_max[SG];
  threadgroup float shared_sum[SG];
  float largest = -3.4e38f;
  LANES_MAX(largest) for (int i = l; i < W; i += SG * SIMD_W) {
    const float v = LD(logits, start + i);
    largest = v > largest ? v : largest;
  }
  largest = SIMD_MAX(largest);
  if (l % SIMD_W == 0) shared_max[l / SIMD_W] = largest;
  TGBARRIER;
  for (int k = 0; k < SG; ++k) largest = shared_max[k] > largest ? shared_max[k] : largest;
  float sum = 0.0f;
  LANES_SUM(sum) for (int i = l; i < W; i += SG * SIMD_W) sum += fexp2((LD(logits, start + i) - largest) * LOG2E);
  sum = SIMD_SUM(sum);
  if (l % SIMD_W == 0) shared_sum[l / SIMD_W] = sum;
  TGBARRIER;
  if (l == 0) {
    float total = 0.0f;
    for (int k = 0; k < SG; ++k) total += shared_sum[k];
    const int t = target[row];
    const float mine = largest + k_log(total), logit = t >= 0 && t < W ? LD(logits, start + (t >= 0 && t < W ? t : 0)) : 0.0f;
    const float before = FIRST ? mine : lse_before[row], upper = before > mine ? before : mine;
    lse[row] = FIRST ? mine : upper + k_log(k_exp(before - upper) + k_exp(mine - upper));
    picked[row] = FIRST ? logit : picked_before[row] + logit;
  }
