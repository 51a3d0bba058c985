// The gradient of out[m] = sum over k of gate[m,k] * y[row of copy (m,k)]: for each row of y its token's gradient times its gate, and
// for each gate the product of both rows; in float32. Padding rows, whose copy is negative, get zeros.
//
// Sizes: dy [M,D]; y [N,D]; gate [S], S = M*K; copy [N]; out, of type T [N,D]; dgate [S]. A threadgroup of SG simdgroups makes a row.
  const int D = y_shape[1], row = thread_position_in_grid.y, l = thread_index_in_threadgroup, from = copy[row];
  const int token = from < 0 ? 0 : from / K;
  const size_t start = (size_t)row * D, there = (size_t)token * D;
  threadgroup float shared[SG];
  const float scale = from < 0 ? 0.0f : gate[from < 0 ? 0 : from];
  float part = 0.0f;
  LANES_SUM(part) for (int d = l; d < D; d += SG * SIMD_W) {
    const float g = LD(dy, there + d);
    part += g * LD(y, start + d);
    ST(T, out, start + d, from < 0 ? 0.0f : scale * g);
  }
  part = SIMD_SUM(part);
  if (l % SIMD_W == 0) shared[l / SIMD_W] = part;
  TGBARRIER;
  if (l == 0 && from >= 0) {
    float total = 0.0f;
    for (int k = 0; k < SG; ++k) total += shared[k];
    dgate[from] = total;
  }
