// Weighted sums of rows: out[n] = sum over j of scale[n,j] * src[index[n,j]], in float32; a negative index adds nothing. Sends tokens
// to their experts (J = 1), fetches and mixes the results (J = K), and both the other way round for the gradients.
//
// Sizes: src [R,D]; index, scale [N,J], scale read if SCALED; out [N,D] of type T. On a GPU a thread makes V neighbouring elements, V a
// divisor of D, read and written at once; on a CPU a thread makes CPT elements of a row.
  const int D = src_shape[1];
  if (V > 1) {
    const int N = index_shape[0], per = D / V, i = thread_position_in_grid.x, row = i / per, at = i - row * per;
    if (row < N) {
      float sum[V];
      REGS for (int v = 0; v < V; ++v) sum[v] = 0.0f;
      REGS for (int j = 0; j < J; ++j) {
        const int from = index[row * J + j];
        const float factor = from < 0 ? 0.0f : (SCALED ? scale[SCALED ? row * J + j : 0] : 1.0f);
        const PACK(T, V) pack = LD_PACK(T, V, src, (size_t)(from < 0 ? 0 : from) * per + at);
        REGS for (int v = 0; v < V; ++v) sum[v] += from < 0 ? 0.0f : factor * LD(pack.v, v);
      }
      PACK(T, V) made;
      REGS for (int v = 0; v < V; ++v) ST(T, made.v, v, sum[v]);
      ST_PACK(T, V, out, (size_t)row * per + at, made);
    }
  } else {
    const int row = thread_position_in_grid.y;
    const int begin = thread_position_in_grid.x * CPT, end = begin + CPT < D ? begin + CPT : D;
    LANES for (int d = begin; d < end; ++d) {
      float sum = 0.0f;
      for (int j = 0; j < J; ++j) {
        const int from = index[row * J + j];
        const float value = LD(src, (size_t)(from < 0 ? 0 : from) * D + d);
        sum += from < 0 ? 0.0f : (SCALED ? scale[SCALED ? row * J + j : 0] : 1.0f) * value;
      }
      ST(T, out, (size_t)row * D + d, sum);
    }
  }
