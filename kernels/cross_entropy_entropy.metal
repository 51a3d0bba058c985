// For each row of logits the sum over its classes from which the Renyi entropy of order 1 + a follows: of p^(1 + a) if DIRECT, else
// of (p^(1 + a) - p) / a, which loses no digits near order 1; added to that of the slices that came before, unless this is the FIRST.
//
// Sizes: logits [C,W]; lse over all slices, before, sum [C]; numbers [8] = a, .... A threadgroup of SG simdgroups makes a row.
  const int W = logits_shape[1], row = thread_position_in_grid.y, l = thread_index_in_threadgroup;
  const size_t start = (size_t)row * W;
  threadgroup float shared[SG];
  const float shift = lse[row], a = numbers[0];
  float part = 0.0f;
  LANES_SUM(part) for (int i = l; i < W; i += SG * SIMD_W) {
    const float log_p = LD(logits, start + i) - shift;
    part += DIRECT ? k_exp((1.0f + a) * log_p) : k_tilt(log_p, log_p, a);
  }
  part = SIMD_SUM(part);
  if (l % SIMD_W == 0) shared[l / SIMD_W] = part;
  TGBARRIER;
  if (l == 0) {
    float total = FIRST ? 0.0f : before[row];
    for (int k = 0; k < SG; ++k) total += shared[k];
    sum[row] = total;
  }
