// y = x W^T straight from NF4 codes, for the few rows of x of a decoding step. Row m may have a matrix of its own: expert[m] of E.
//
// Sizes: x [M,I]; expert [M]; codes [E, O I / V], V in a word; scale_codes [E,P] with P = O I / 64; scale_absmax [E,Q] with
// Q = ceil(P/256); offset [E]; scales [256]; values [16]; y [M,O]. I is a multiple of 64.
// A simdgroup makes OUTS neighbouring outputs. Its lanes share out the runs of RUN words of a row, AT_ONCE runs each time;
// a run lies in one block.
  constexpr int I = I_SIZE, O = O_SIZE, WIDE = RUN * V, RUNS = I / WIDE;  // values of a run, runs of a row
  constexpr int STRIDE = AT_ONCE * SIMD_W, P = (int)((size_t)O * I / 64), Q = (P + 255) / 256;
  constexpr bool WHOLE = RUNS % STRIDE == 0;
  const int m = threadgroup_position_in_grid.y, lid = thread_index_in_threadgroup, lane = lid % SIMD_W;
  const int first = (threadgroup_position_in_grid.x * SG + lid / SIMD_W) * OUTS, e = GATHER ? expert[m] : 0;
  threadgroup float value[16], scale[256];
  const float base = offset[e];
  float sum[OUTS];
  REGS for (int o = 0; o < OUTS; ++o) sum[o] = 0.0f;
  for (int start = 0; start < RUNS; start += STRIDE) {
    uint words[OUTS][AT_ONCE][RUN], scale_code[OUTS][AT_ONCE];
    float absmax[OUTS][AT_ONCE];
    REGS for (int o = 0; o < OUTS; ++o) {
      const uint row = first + o < O ? first + o : O - 1;
      REGS for (int r = 0; r < AT_ONCE; ++r) {
        const uint run = start + lane + r * SIMD_W;
        const uint at = row * RUNS + (WHOLE || run < RUNS ? run : 0), block = at / (64 / WIDE);
        LANES for (int i = 0; i < RUN; ++i) words[o][r][i] = codes[((size_t)e * O * RUNS + at) * RUN + i];
        scale_code[o][r] = scale_codes[(size_t)e * P + block];
        absmax[o][r] = scale_absmax[e * Q + block / 256];
      }
    }
    if (start == 0) {  // the first words are under way meanwhile
      for (int i = lid; i < 16; i += SG * SIMD_W) value[i] = values[i];
      for (int i = lid; i < 256; i += SG * SIMD_W) scale[i] = scales[i];
      TGBARRIER;
    }
    REGS for (int r = 0; r < AT_ONCE; ++r) {
      const int run = start + lane + r * SIMD_W, there = WHOLE || run < RUNS ? run : 0;
      float xs[WIDE];
      if (SIMD_W > 1 && V * sizeof(T) == 16 && PACKABLE(x)) {
        const PACK(T, V) pack = LD_PACK(T, V, x, m * RUNS + there);
        UNROLL for (int v = 0; v < V; ++v) xs[v] = LD(pack.v, v);
      } else {
        LANES for (int v = 0; v < WIDE; ++v) xs[v] = LD(x, (size_t)m * I + there * WIDE + v);
      }
      REGS for (int o = 0; o < OUTS; ++o) {
        float part = 0.0f;
        LANES_SUM(part) for (int i = 0; i < RUN; ++i) {
          UNROLL for (int v = 0; v < V; ++v) part += value[NF4_CODE(words[o][r][i], v)] * xs[i * V + v];
        }
        if (WHOLE || run < RUNS) sum[o] += (scale[scale_code[o][r]] * absmax[o][r] + base) * part;
      }
    }
  }
  REGS for (int o = 0; o < OUTS; ++o) {
    const float all = SIMD_SUM(sum[o]);
    if (lane == 0 && first + o < O) ST(T, y, (size_t)m * O + first + o, all);
  }
