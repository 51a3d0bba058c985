// y = x W^T straight from NF4 codes, for the few rows of x of a decoding step. Row m may have a matrix of its own: expert[m] of E.
//
// Sizes: x [M,I]; expert [M]; codes [E, O I / V], V in a word; scale_codes [E,P] with P = O I / 64; scale_absmax [E,Q] with
// Q = ceil(P/256); offset [E]; scales [256]; values [16]; y [M,O]. I is a multiple of 64.
// A simdgroup makes OUTS neighbouring outputs. Its lanes share out the runs of RUN words of a row, AT_ONCE runs each time;
// a run lies in one block.
  constexpr int WIDE = RUN * V;  // values of a run
  const int I = I_SIZE, O = O_SIZE, m = threadgroup_position_in_grid.y, lid = thread_index_in_threadgroup;
  const int lane = lid % SIMD_W, first = (threadgroup_position_in_grid.x * SG + lid / SIMD_W) * OUTS;
  const int e = GATHER ? expert[m] : 0, P = (int)((size_t)O * I / 64), Q = (P + 255) / 256;
  threadgroup float value[16], scale[256];
  for (int i = lid; i < 16; i += SG * SIMD_W) value[i] = values[i];
  for (int i = lid; i < 256; i += SG * SIMD_W) scale[i] = scales[i];
  TGBARRIER;
  const float base = offset[e];
  float sum[OUTS];
  REGS for (int o = 0; o < OUTS; ++o) sum[o] = 0.0f;
  for (int start = 0; start < I / WIDE; start += AT_ONCE * SIMD_W) {
    uint words[OUTS][AT_ONCE][RUN];
    float factor[OUTS][AT_ONCE];
    REGS for (int o = 0; o < OUTS; ++o) {
      const size_t row = first + o < O ? first + o : O - 1;
      REGS for (int r = 0; r < AT_ONCE; ++r) {  // a run past the row's end counts zero
        const int run = start + r * SIMD_W + lane, there = run < I / WIDE ? run : 0;
        const size_t at = row * I + there * WIDE;
        const int block = (int)(at / 64);
        LANES for (int i = 0; i < RUN; ++i) words[o][r][i] = codes[((size_t)e * O * I + at) / V + i];
        const float f = scale[scale_codes[(size_t)e * P + block]] * scale_absmax[e * Q + block / 256] + base;
        factor[o][r] = run < I / WIDE ? f : 0.0f;
      }
    }
    REGS for (int r = 0; r < AT_ONCE; ++r) {
      const int run = start + r * SIMD_W + lane, there = run < I / WIDE ? run : 0;
      float xs[WIDE];
      LANES for (int v = 0; v < WIDE; ++v) xs[v] = LD(x, (size_t)m * I + there * WIDE + v);
      REGS for (int o = 0; o < OUTS; ++o) {
        float part = 0.0f;
        LANES_SUM(part) for (int i = 0; i < RUN; ++i) {
          UNROLL for (int v = 0; v < V; ++v) part += value[NF4_CODE(words[o][r][i], v)] * xs[i * V + v];
        }
        sum[o] += factor[o][r] * part;
      }
    }
  }
  REGS for (int o = 0; o < OUTS; ++o) {
    const float all = SIMD_SUM(sum[o]);
    if (lane == 0 && first + o < O) ST(T, y, (size_t)m * O + first + o, all);
  }
