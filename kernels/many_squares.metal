// Sums of squares: out[p] = total[p] plus the squares of share p of COUNT of eight arrays, in float32 and always in the same order. So the squares
// of any number of arrays add up in one small array, whose sum is left to the end.
//
// Sizes: a0 .. a7 [n], of type T, n a multiple of V; total, out [PARTS]. A threadgroup of SG simdgroups makes a share.
  const int l = thread_index_in_threadgroup, part = threadgroup_position_in_grid.x, first = part * SG * SIMD_W + l;
  threadgroup float shared[SG];
  float sum = 0.0f;
  if (COUNT > 0) MANY_SQUARES(a0, a0_shape)
  if (COUNT > 1) MANY_SQUARES(a1, a1_shape)
  if (COUNT > 2) MANY_SQUARES(a2, a2_shape)
  if (COUNT > 3) MANY_SQUARES(a3, a3_shape)
  if (COUNT > 4) MANY_SQUARES(a4, a4_shape)
  if (COUNT > 5) MANY_SQUARES(a5, a5_shape)
  if (COUNT > 6) MANY_SQUARES(a6, a6_shape)
  if (COUNT > 7) MANY_SQUARES(a7, a7_shape)
  sum = SIMD_SUM(sum);
  if (l % SIMD_W == 0) shared[l / SIMD_W] = sum;
  TGBARRIER;
  if (l == 0) {
    float all = total[part];
    for (int k = 0; k < SG; ++k) all += shared[k];
    out[part] = all;
  }
