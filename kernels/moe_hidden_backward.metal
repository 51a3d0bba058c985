// Back through relu and the gates, for each row of token copies: with a = relu(h) and da the gradient that the row's output hands down
// before its gate, dh = gate * da where a > 0, and the gate's gradient is da . a, since the output is linear in a. In float32.
// Padding rows, whose copy is negative, get zeros.
//
// Sizes: da, a [N,F]; gate [S], S token copies; copy, dgate [N]; dh, of type T [N,F]. A threadgroup of SG simdgroups makes a row,
// V elements at a time, V a divisor of F.
  const int F = a_shape[1], row = threadgroup_position_in_grid.x, l = thread_index_in_threadgroup, from = copy[row];
  const size_t start = (size_t)row * (F / V);
  threadgroup float shared[SG];
  const float scale = from < 0 ? 0.0f : gate[from < 0 ? 0 : from];
  float part = 0.0f;
  if (V > 1) {
    for (int f = l; f < F / V; f += SG * SIMD_W) {
      const PACK(T, V) g = LD_PACK(T, V, da, start + f), value = LD_PACK(T, V, a, start + f);
      PACK(T, V) made;
      REGS for (int v = 0; v < V; ++v) {
        part += LD(g.v, v) * LD(value.v, v);
        ST(T, made.v, v, LD(value.v, v) > 0.0f ? scale * LD(g.v, v) : 0.0f);
      }
      ST_PACK(T, V, dh, start + f, made);
    }
  } else {
    LANES_SUM(part) for (int f = l; f < F; f += SG * SIMD_W) {
      const float g = LD(da, start + f), value = LD(a, start + f);
      part += g * value;
      ST(T, dh, start + f, value > 0.0f ? scale * g : 0.0f);
    }
  }
  part = SIMD_SUM(part);
  if (l % SIMD_W == 0) shared[l / SIMD_W] = part;
  TGBARRIER;
  if (l == 0) {
    float total = 0.0f;
    for (int k = 0; k < SG; ++k) total += shared[k];
    dgate[row] = total;
  }
