// Sums of squares: out[p] = total[p] plus the squares of share p of g, in float32 and always in the same order. So the squares of many
// arrays add up in one small array, whose sum is left to the end.
//
// Sizes: g [n]; total, out [PARTS]. A threadgroup of SG simdgroups makes a share, V elements at a time, V a divisor of n.
  const int n = g_shape[0], part = threadgroup_position_in_grid.x, l = thread_index_in_threadgroup;
  threadgroup float shared[SG];
  float sum = 0.0f;
  if (SIMD_W == 1) {
    const int share = (n + PARTS - 1) / PARTS, begin = part * share < n ? part * share : n, end = begin + share < n ? begin + share : n;
    LANES_SUM(sum) for (int i = begin; i < end; ++i) {
      const float v = LD(g, i);
      sum += v * v;
    }
  } else if (V > 1 && PACKABLE(g)) {
    for (int i = part * SG * SIMD_W + l; i < n / V; i += PARTS * SG * SIMD_W) {
      const PACK(T, V) pack = LD_PACK(T, V, g, i);
      REGS for (int v = 0; v < V; ++v) sum += LD(pack.v, v) * LD(pack.v, v);
    }
  } else {
    for (int i = part * SG * SIMD_W + l; i < n; i += PARTS * SG * SIMD_W) sum += LD(g, i) * LD(g, i);
  }
  sum = SIMD_SUM(sum);
  if (l % SIMD_W == 0) shared[l / SIMD_W] = sum;
  TGBARRIER;
  if (l == 0) {
    float all = total[part];
    for (int k = 0; k < SG; ++k) all += shared[k];
    out[part] = all;
  }
