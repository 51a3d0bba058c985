// The product of a few rows with an NF4 matrix straight from its codes, for decoding: y = residual + act(norm(x) W^T + scale low B^T),
// see matvec.h. With GATHER row m of y has a matrix of its own, expert[m] of E, and comes from row m / SHARE of x.
//
// Sizes: x [M / SHARE, I]; expert [M]; codes [E, O I / V], V in a word; scale_codes [E,P] with P = O I / 64; scale_absmax [E,Q] with
// Q = ceil(P/256); offset [E]; scales [256]; values [16]; norm [I]; low [M,RANK]; b [E,O,RANK]; residual, y [M,O]. I is a multiple of 64.
// The lanes of SPLIT simdgroups share out the runs of RUN words of a row, AT_ONCE runs each time; a run lies in one block.
  constexpr int I = I_SIZE, O = O_SIZE, WIDE = RUN * V, RUNS = I / WIDE;  // values of a run, runs of a row
  constexpr int LANES_ALL = SPLIT * SIMD_W, STRIDE = AT_ONCE * LANES_ALL, P = (int)((size_t)O * I / 64), Q = (P + 255) / 256;
  constexpr int PX = 16 / (int)sizeof(T), PACKS = V / PX > 0 ? V / PX : 1;  // of x: values of a pack, packs of a word
  constexpr bool WHOLE = RUNS % STRIDE == 0, ONE_MAX = 16384 % I == 0;  // whether a row has a single scale_absmax
  const int lid = thread_index_in_threadgroup, rows = x_shape[0];
  const auto group = threadgroup_position_in_grid;
  MATVEC_PLACES
  threadgroup float value[16 * SIMD_W], scale[256];  // a copy of the values for each lane, so that lanes never share a bank
  const float base = offset[e];
  const bool packed = PACKABLE(x);
  float row_max[OUTS];
  if (ONE_MAX) {
    REGS for (int o = 0; o < OUTS; ++o) row_max[o] = scale_absmax[e * Q + (first + o < O ? first + o : O - 1) / (16384 / (ONE_MAX ? I : 16384))];
  }
  ROLLED for (int start = 0; start < RUNS; start += STRIDE) {  // unrolled it would take the registers of half the threads
    uint words[OUTS][AT_ONCE][RUN], scale_code[OUTS][AT_ONCE];
    float absmax[OUTS][AT_ONCE];
    PACK(T, PX) packs[ROWS][AT_ONCE][PACKS];
    REGS for (int o = 0; o < OUTS; ++o) {
      const uint row = first + o < O ? first + o : O - 1;
      REGS for (int r = 0; r < AT_ONCE; ++r) {
        const uint run = start + part * SIMD_W + lane + r * LANES_ALL;
        const uint at = row * RUNS + (WHOLE || run < RUNS ? run : 0), block = at / (64 / WIDE);
        LANES for (int i = 0; i < RUN; ++i) words[o][r][i] = codes[((size_t)e * O * RUNS + at) * RUN + i];
        scale_code[o][r] = scale_codes[(size_t)e * P + block];
        absmax[o][r] = ONE_MAX ? row_max[o] : scale_absmax[e * Q + block / 256];
      }
    }
    if (SIMD_W > 1) {
      REGS for (int i = 0; i < ROWS; ++i) {
        const int row = (m + i < M ? m + i : M - 1) / SHARE;
        REGS for (int r = 0; r < AT_ONCE; ++r) {
          const int run = start + part * SIMD_W + lane + r * LANES_ALL, at = row * RUNS + (WHOLE || run < RUNS ? run : 0);
          REGS for (int p = 0; p < PACKS; ++p) {
            if (packed) packs[i][r][p] = LD_PACK(T, PX, x, at * PACKS + p);
            else { UNROLL for (int v = 0; v < PX; ++v) packs[i][r][p].v[v] = x[(size_t)at * WIDE + p * PX + v]; }
          }
        }
      }
    }
    if (start == 0) {  // the first words are under way meanwhile
      REGS for (int i = 0; i < 16 * SIMD_W; i += SG * SIMD_W) {
        if (i + lid < 16 * SIMD_W) value[i + lid] = values[(i + lid) / SIMD_W];
      }
      REGS for (int i = 0; i < 256; i += SG * SIMD_W) {
        if (i + lid < 256) scale[i + lid] = scales[i + lid];
      }
      MATVEC_ADAPT
      TGBARRIER;
    }
    REGS for (int r = 0; r < AT_ONCE; ++r) {
      const int run = start + part * SIMD_W + lane + r * LANES_ALL, there = WHOLE || run < RUNS ? run : 0;
      float xs[ROWS][WIDE];
      REGS for (int i = 0; i < ROWS; ++i) {
        const size_t at = (size_t)((m + i < M ? m + i : M - 1) / SHARE) * I + there * WIDE;
        if (SIMD_W > 1) {
          UNROLL for (int v = 0; v < WIDE; ++v) xs[i][v] = LD(packs[i][r][v / PX].v, v % PX);
        } else {
          LANES for (int v = 0; v < WIDE; ++v) xs[i][v] = LD(x, at + v);
        }
        if (NORM) {
          float squares = 0.0f;
          LANES_SUM(squares) for (int v = 0; v < WIDE; ++v) squares += xs[i][v] * xs[i][v];
          LANES for (int v = 0; v < WIDE; ++v) xs[i][v] *= norm[there * WIDE + v];
          if (WHOLE || run < RUNS) square[i] += squares;
        }
      }
      REGS for (int o = 0; o < OUTS; ++o) {
        const float factor = WHOLE || run < RUNS ? scale[scale_code[o][r]] * absmax[o][r] + base : 0.0f;
        REGS for (int i = 0; i < ROWS; ++i) {
          float some = 0.0f;
          LANES_SUM(some) for (int w = 0; w < RUN; ++w) {
            UNROLL for (int v = 0; v < V; ++v) some += value[NF4_AT(words[o][r][w], v, lane)] * xs[i][w * V + v];
          }
          sum[i][o] += factor * some;
        }
      }
    }
  }
  MATVEC_FINISH
