// What the matrix-vector texts share: y = residual + act(norm(x) W^T + scale low B^T), all around the product left out where the
// template says so. A threadgroup has SG simdgroups; SPLIT of them share out the columns of OUTS outputs of ROWS rows of x.
// The RMS norm's factor is one number a row, so its sum of squares is made beside the products and divides them at the end.
// A text that uses these says before MATVEC_PLACES what lid, group (its three numbers) and rows (of x) are: MLX looks for the
// attributes in the text alone.
#define MATVEC_PLACES \
  const int lane = lid % SIMD_W, simdgroup = lid / SIMD_W, part = simdgroup % SPLIT; \
  const int first = (group.x * (SG / SPLIT) + simdgroup / SPLIT) * OUTS; \
  const int m = group.y * ROWS, M = rows * SHARE, e = GATHER ? expert[m] : 0; \
  threadgroup float found[SG * ROWS * (2 * OUTS + 1)]; \
  float sum[ROWS][OUTS], adapted[ROWS][OUTS], square[ROWS]; \
  REGS for (int i = 0; i < ROWS; ++i) { \
    square[i] = 0.0f; \
    REGS for (int o = 0; o < OUTS; ++o) sum[i][o] = adapted[i][o] = 0.0f; \
  }
// low [M, RANK] is the thin product A norm(x); b is [E, O, RANK].
#define MATVEC_ADAPT \
  REGS for (int start_r = 0; start_r < RANK; start_r += SPLIT * SIMD_W) { \
    const int own = start_r + part * SIMD_W + lane, r = own < RANK ? own : 0; \
    REGS for (int o = 0; o < OUTS; ++o) { \
      const int row = first + o < O ? first + o : O - 1; \
      const float weight = own < RANK ? LD(b, ((size_t)e * O + row) * RANK + r) : 0.0f; \
      REGS for (int i = 0; i < ROWS; ++i) adapted[i][o] += weight * low[(m + i < M ? m + i : M - 1) * RANK + r]; \
    } \
  }
#define MATVEC_FINISH \
  REGS for (int i = 0; i < ROWS; ++i) { \
    const int at = (simdgroup * ROWS + i) * (2 * OUTS + 1); \
    const float squares = NORM ? SIMD_SUM(square[i]) : 0.0f; \
    if (lane == 0) found[at] = squares; \
    REGS for (int o = 0; o < OUTS; ++o) { \
      const float product = SIMD_SUM(sum[i][o]), more = RANK > 0 ? SIMD_SUM(adapted[i][o]) : 0.0f; \
      if (lane == 0) found[at + 1 + o] = product; \
      if (lane == 0) found[at + 1 + OUTS + o] = more; \
    } \
  } \
  TGBARRIER; \
  for (int n = lid; n < SG / SPLIT * ROWS * OUTS; n += SG * SIMD_W) { \
    const int o = n % OUTS, i = n / OUTS % ROWS, unit = n / (OUTS * ROWS); \
    float squares = 0.0f, all = 0.0f, more = 0.0f; \
    for (int p = 0; p < SPLIT; ++p) { \
      const int at = ((unit * SPLIT + p) * ROWS + i) * (2 * OUTS + 1); \
      squares += found[at]; \
      all += found[at + 1 + o]; \
      more += found[at + 1 + OUTS + o]; \
    } \
    const int out = (group.x * (SG / SPLIT) + unit) * OUTS + o; \
    if (NORM) all *= 1.0f / k_sqrt(squares / I + k_u2f(EPS_BITS)); \
    if (RANK > 0) all += k_u2f(SCALE_BITS) * more; \
    if (RELU && all < 0.0f) all = 0.0f; \
    if (out < O && m + i < M) { \
      if (RESIDUAL) all += LD(residual, (size_t)(m + i) * O + out); \
      ST(TY, y, (size_t)(m + i) * O + out, all); \
    } \
  }
