// The product of a few rows with a dense matrix, on a GPU, for decoding: y = residual + act(norm(x) W^T + scale low B^T), see matvec.h.
// With GATHER row m of y has a matrix of its own, expert[m] of E, and comes from row m / SHARE of x.
//
// Sizes: x [M / SHARE, I] with X_ROW elements from row to row; expert [M]; w [E,O,I]; norm [I]; low [M,RANK]; b [E,O,RANK]; residual, y [M,O]. V divides I.
// The lanes of SPLIT simdgroups share out the packs of V values of a row, AT_ONCE packs each time.
  constexpr int I = I_SIZE, O = O_SIZE, RUNS = I / V, LANES_ALL = SPLIT * SIMD_W, STRIDE = AT_ONCE * LANES_ALL;
  const int lid = thread_index_in_threadgroup, rows = x_shape[0];
  const auto group = threadgroup_position_in_grid;
  MATVEC_PLACES
  const bool packed = V > 1 && PACKABLE(w);
  for (int start = 0; start < RUNS; start += STRIDE) {
    PACK(TW, V) words[OUTS][AT_ONCE];
    REGS for (int o = 0; o < OUTS; ++o) {
      const size_t row = (size_t)e * O + (first + o < O ? first + o : O - 1);
      REGS for (int r = 0; r < AT_ONCE; ++r) {
        const int run = start + part * SIMD_W + lane + r * LANES_ALL, there = run < RUNS ? run : 0;
        if (packed) words[o][r] = LD_PACK(TW, V, w, row * RUNS + there);
        else { UNROLL for (int v = 0; v < V; ++v) words[o][r].v[v] = w[row * I + there * V + v]; }
      }
    }
    REGS for (int r = 0; r < AT_ONCE; ++r) {
      const int run = start + part * SIMD_W + lane + r * LANES_ALL, there = run < RUNS ? run : 0;
      const float counts = run < RUNS ? 1.0f : 0.0f;
      REGS for (int i = 0; i < ROWS; ++i) {
        const size_t at = (size_t)((m + i < M ? m + i : M - 1) / SHARE) * X_ROW + there * V;
        float xs[V];
        UNROLL for (int v = 0; v < V; ++v) {
          const float value = counts * LD(x, at + v);
          if (NORM) square[i] += value * value;
          xs[v] = NORM ? value * norm[there * V + v] : value;
        }
        REGS for (int o = 0; o < OUTS; ++o) {
          UNROLL for (int v = 0; v < V; ++v) sum[i][o] += LD(words[o][r].v, v) * xs[v];
        }
      }
    }
  }
  MATVEC_ADAPT
  MATVEC_FINISH
