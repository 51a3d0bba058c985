// Selective scan, forward (Gu & Dao 2023, arXiv 2312.00752, algorithm 2). For every batch row and channel, with N states s:
//   d_t = softplus(dt_t + dt_bias),   s_t = exp(d_t A) s_{t-1} + d_t x_t b_t,   y_t = (c_t . s_t + skip x_t) silu(z_t)
// and s_{t-1} = 0 where reset_t is set.
//
// Sizes: x, dt, z, y [B,T,I]; A [I,N]; b, c [B,T,N]; skip, dt_bias [I]; reset [B,T]; state, state_out [B,I,N];
// borders [B,K-1,N,I], the states between the K chunks of TC steps, for the backward.
// A threadgroup scans CG channels of one batch row. It plays two roles in turn: to load and store, its threads lie along the
// channels, NL time steps at once; to scan, NL neighbouring lanes share a channel and hold NS of its states each.
  constexpr int NS = N / NL;
  constexpr int CG = SG * SIMD_W / NL * CPT;
  constexpr int THREADS = SG * SIMD_W;
  const int T = x_shape[1], I = x_shape[2], K = (T + TC - 1) / TC;
  const int lid = thread_index_in_threadgroup, batch = thread_position_in_grid.y;
  const int first = threadgroup_position_in_grid.x * CG;
  // Role 1: steps j0, j0 + NL, ... of CPT channels from group channel c1. Role 2: states n0 ... of channels from c2.
  // A channel past the last one computes on the last one's values and stores nothing.
  const int j0 = lid / (CG / CPT), c1 = lid % (CG / CPT) * CPT;
  const int q = lid % NL, n0 = q * NS, c2 = lid / NL * CPT;
  const bool mine1 = SIMD_W == 1 || first + c1 < I, mine2 = SIMD_W == 1 || first + c2 < I;
  const int i1 = mine1 ? first + c1 : I - CPT, i2 = mine2 ? first + c2 : I - CPT;

  threadgroup float delta[TC][CG], drive[TC][CG], out[TC][CG];  // d_t; d_t x_t; y_t before the gate
  threadgroup float bs[TC * N], cs[TC * N];
  threadgroup int fresh[TC];

  float s[NS][CPT], a[NS][CPT], bias[CPT], direct[CPT], gate[TC / NL][CPT];
  REGS for (int n = 0; n < NS; ++n) {
    for (int ch = 0; ch < CPT; ++ch) {
      const size_t at = (size_t)(i2 + ch) * N + n0 + n;
      a[n][ch] = A[at] * LOG2E;  // exp(d A) is 2^(d a)
      s[n][ch] = HAS_STATE ? state[(size_t)batch * I * N + at] : 0.0f;
    }
  }
  LANES for (int ch = 0; ch < CPT; ++ch) {
    bias[ch] = HAS_BIAS ? dt_bias[i1 + ch] : 0.0f;
    direct[ch] = HAS_SKIP ? skip[i1 + ch] : 0.0f;
  }

  for (int k = 0; k < K; ++k) {
    const int start = k * TC, length = T - start < TC ? T - start : TC;
    const size_t row = (size_t)batch * T + start;
    if (k > 0 && mine2) {
      const size_t at = (((size_t)batch * (K - 1) + k - 1) * N + n0) * I + i2;
      REGS for (int n = 0; n < NS; ++n) { LANES for (int ch = 0; ch < CPT; ++ch) borders[at + (size_t)n * I + ch] = s[n][ch]; }
    }

    // Role 1. Steps past the end get d = 0 and drive 0: they leave the state as it is.
    REGS for (int i = 0; i < TC / NL; ++i) {
      const int j = i * NL + j0;
      const size_t at = (row + (j < length ? j : 0)) * I + i1;
      const float real = j < length ? 1.0f : 0.0f;
      LANES for (int ch = 0; ch < CPT; ++ch) {
        const float xt = LD(x, at + ch), raw = LD(dt, at + ch) + bias[ch];
        const float d = (HAS_BIAS ? k_softplus(raw) : raw) * real;
        delta[j][c1 + ch] = d;
        drive[j][c1 + ch] = d * xt;
        out[j][c1 + ch] = direct[ch] * xt;
        if (HAS_Z) {
          const float zt = LD(z, at + ch);
          gate[i][ch] = zt * k_sigmoid(zt);
        }
      }
    }
    for (int e = lid; e < TC * N; e += THREADS) {
      const bool real = e < length * N;
      bs[e] = real ? LD(b, row * N + e) : 0.0f;
      cs[e] = real ? LD(c, row * N + e) : 0.0f;
    }
    if (HAS_RESET) {
      for (int j = lid; j < TC; j += THREADS) fresh[j] = j < length && reset[row + j] != 0;
    }
    TGBARRIER;

    // Role 2.
    UNROLL for (int j = 0; j < TC; ++j) {
      if (HAS_RESET && fresh[j]) {
        REGS for (int n = 0; n < NS; ++n) { LANES for (int ch = 0; ch < CPT; ++ch) s[n][ch] = 0.0f; }
      }
      float sum[CPT];
      LANES for (int ch = 0; ch < CPT; ++ch) sum[ch] = 0.0f;
      REGS for (int n = 0; n < NS; ++n) {
        const float bn = bs[j * N + n0 + n], cn = cs[j * N + n0 + n];
        LANES for (int ch = 0; ch < CPT; ++ch) {
          s[n][ch] = fexp2(delta[j][c2 + ch] * a[n][ch]) * s[n][ch] + drive[j][c2 + ch] * bn;
          sum[ch] += s[n][ch] * cn;
        }
      }
      for (int o = 1; o < NL; o <<= 1) sum[0] += SIMD_XOR(sum[0], o);
      if (q == 0) {
        LANES for (int ch = 0; ch < CPT; ++ch) out[j][c2 + ch] += sum[ch];
      }
    }
    TGBARRIER;

    // Role 1 again.
    REGS for (int i = 0; i < TC / NL; ++i) {
      const int j = i * NL + j0;
      if (mine1 && j < length) {
        const size_t at = (row + j) * I + i1;
        LANES for (int ch = 0; ch < CPT; ++ch) ST(TX, y, at + ch, HAS_Z ? out[j][c1 + ch] * gate[i][ch] : out[j][c1 + ch]);
      }
    }
    TGBARRIER;
  }

  if (mine2) {
    REGS for (int n = 0; n < NS; ++n) {
      for (int ch = 0; ch < CPT; ++ch) state_out[((size_t)batch * I + i2 + ch) * N + n0 + n] = s[n][ch];
    }
  }
