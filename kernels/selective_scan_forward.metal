// Selective scan, forward (Gu & Dao 2023, arXiv 2312.00752, algorithm 2). For every batch row and channel, with N states s:
//   d_t = softplus(dt_t + dt_bias),   s_t = exp(d_t A) s_{t-1} + d_t x_t b_t,   y_t = (c_t . s_t + skip x_t) silu(z_t)
// and s_{t-1} = 0 where reset_t is set.
//
// Sizes: x, dt, z, y [B,T,I]; A [I,N], or log(-A) where LOG_A; b, c [B,T,N]; skip, dt_bias [I]; inputs over time may be views;
// reset [B,T]; state [B,I,N]; borders [B,K-1,N,I], the states between the K chunks of TC steps, for the backward.
// A threadgroup scans CG channels of one batch row. It plays two roles in turn: to load and store, its threads lie along the
// channels, NL time steps at once; to scan, NL neighbouring lanes share a channel and hold NS of its states each.
// AHEAD: the loads of the next chunk are under way while this one is scanned.
//
// Time may be cut into SEGS segments of whole chunks, scanned side by side. A first launch with SUMMARY finds for each segment the
// state that it ends with if it starts at zero (state_out [SEGS,B,I,N]), its sum of d_t (total [SEGS,B,I]), and in kept [SEGS,B,I]
// 0 if a document starts in it, else 1. From those (as ends, totals, keeps) a segment of the second launch finds its first state.
  constexpr int NS = N / NL;
  constexpr int CG = SG * SIMD_W / NL * CPT;
  constexpr int THREADS = SG * SIMD_W;
  constexpr int ROWS = AHEAD ? TC / NL : 1, PAIRS = AHEAD ? (TC * N + THREADS - 1) / THREADS : 1;
  const int B = x_shape[0], T = x_shape[1], I = x_shape[2], K = (T + TC - 1) / TC;
  const int lid = thread_index_in_threadgroup, batch = threadgroup_position_in_grid.y, segment = threadgroup_position_in_grid.z;
  const int first = threadgroup_position_in_grid.x * CG;
  const int per_segment = (K + SEGS - 1) / SEGS, first_chunk = segment * per_segment;
  const int last_chunk = first_chunk + per_segment < K ? first_chunk + per_segment : K;
  // Role 1: steps j0, j0 + NL, ... of CPT channels from group channel c1. Role 2: states n0 ... of channels from c2.
  // A channel past the last one computes on the last one's values and stores nothing.
  const int j0 = lid / (CG / CPT), c1 = lid % (CG / CPT) * CPT;
  const int q = lid % NL, n0 = q * NS, c2 = lid / NL * CPT;
  const bool mine1 = SIMD_W == 1 || first + c1 < I, mine2 = SIMD_W == 1 || first + c2 < I;
  const int i1 = mine1 ? first + c1 : I - CPT, i2 = mine2 ? first + c2 : I - CPT;

  // Where role 1's inputs lie: the first step, and from one step and one channel to the next.
  const size_t x_step = SIMD_W == 1 ? 1 : x_strides[2], x_row = x_strides[1], x0 = batch * x_strides[0] + i1 * x_step;
  const size_t dt_step = SIMD_W == 1 ? 1 : dt_strides[2], dt_row = dt_strides[1], dt0 = batch * dt_strides[0] + i1 * dt_step;
  const size_t z_step = SIMD_W == 1 || !HAS_Z ? 1 : z_strides[2], z_row = HAS_Z ? z_strides[1] : 0;
  const size_t z0 = HAS_Z ? batch * z_strides[0] + i1 * z_step : 0, b0 = batch * b_strides[0], c0 = batch * c_strides[0];

  threadgroup float delta[TC][CG], drive[TC][CG], out[TC][CG];  // d_t; d_t x_t; y_t before the gate
  threadgroup float bs[TC * N], cs[TC * N];
  threadgroup int fresh[TC];

  float s[NS][CPT], a[NS][CPT], bias[CPT], direct[CPT], gate[TC / NL][CPT], summed[CPT], open = 1.0f;
  TX x_next[ROWS][CPT];
  TDT dt_next[ROWS][CPT];
  TZ z_next[ROWS][CPT];
  TB b_next[PAIRS];
  TCC c_next[PAIRS];
  int fresh_next = 0;
  REGS for (int n = 0; n < NS; ++n) {
    for (int ch = 0; ch < CPT; ++ch) {
      const size_t at = (size_t)(i2 + ch) * N + n0 + n;
      a[n][ch] = (LOG_A ? -k_exp(LD(A, at)) : LD(A, at)) * LOG2E;  // exp(d A) is 2^(d a)
      s[n][ch] = HAS_STATE && !SUMMARY ? state[(size_t)batch * I * N + at] : 0.0f;
    }
  }
  for (int earlier = 0; SEGS > 1 && !SUMMARY && earlier < segment; ++earlier) {
    for (int ch = 0; ch < CPT; ++ch) {
      const size_t at = (size_t)(earlier * B + batch) * I + i2 + ch;
      const float whole = totals[at], keep = keeps[at];
      REGS for (int n = 0; n < NS; ++n) s[n][ch] = fexp2(whole * a[n][ch]) * keep * s[n][ch] + ends[at * N + n0 + n];
    }
  }
  LANES for (int ch = 0; ch < CPT; ++ch) {
    bias[ch] = HAS_BIAS ? LD(dt_bias, i1 + ch) : 0.0f;
    direct[ch] = HAS_SKIP ? LD(skip, i1 + ch) : 0.0f;
    summed[ch] = 0.0f;
  }

  for (int k = first_chunk - AHEAD; k < last_chunk; ++k) {
    if (!AHEAD || k >= first_chunk) {
      const int start = k * TC, length = T - start < TC ? T - start : TC;
      const size_t row = (size_t)batch * T + start;
      if (!SUMMARY && k > 0 && mine2) {
        const size_t at = (((size_t)batch * (K - 1) + k - 1) * N + n0) * I + i2;
        REGS for (int n = 0; n < NS; ++n) { LANES for (int ch = 0; ch < CPT; ++ch) borders[at + (size_t)n * I + ch] = s[n][ch]; }
      }

      // Role 1. Steps past the end get d = 0 and drive 0: they leave the state as it is.
      REGS for (int i = 0; i < TC / NL; ++i) {
        const int j = i * NL + j0;
        const size_t t = start + (j < length ? j : 0);
        const float real = j < length ? 1.0f : 0.0f;
        LANES for (int ch = 0; ch < CPT; ++ch) {
          const float xt = AHEAD ? LD(x_next[i], ch) : LD(x, x0 + t * x_row + ch);
          const float raw = (AHEAD ? LD(dt_next[i], ch) : LD(dt, dt0 + t * dt_row + ch)) + bias[ch];
          const float d = (HAS_BIAS ? k_softplus(raw) : raw) * real;
          delta[j][c1 + ch] = d;
          drive[j][c1 + ch] = d * xt;
          out[j][c1 + ch] = direct[ch] * xt;
          if (HAS_Z && !SUMMARY) {
            const float zt = AHEAD ? LD(z_next[i], ch) : LD(z, z0 + t * z_row + ch);
            gate[i][ch] = zt * k_sigmoid(zt);
          }
        }
      }
      if (AHEAD) {
        REGS for (int i = 0; i < PAIRS; ++i) {
          const int e = i * THREADS + lid;
          const bool real = e < length * N;
          if (e < TC * N) {
            bs[e] = real ? LD(b_next, i) : 0.0f;
            cs[e] = real ? LD(c_next, i) : 0.0f;
          }
        }
        if (HAS_RESET && lid < TC) fresh[lid] = lid < length && fresh_next;
      } else {
        for (int e = lid; e < TC * N; e += THREADS) {
          const bool real = e < length * N;
          bs[e] = real ? LD(b, b0 + (start + e / N) * b_strides[1] + e % N * b_strides[2]) : 0.0f;
          cs[e] = real ? LD(c, c0 + (start + e / N) * c_strides[1] + e % N * c_strides[2]) : 0.0f;
        }
        if (HAS_RESET) {
          for (int j = lid; j < TC; j += THREADS) fresh[j] = j < length && reset[row + j] != 0;
        }
      }
      TGBARRIER;
    }

    if (AHEAD && k + 1 < last_chunk) {
      const int start = (k + 1) * TC, length = T - start < TC ? T - start : TC;
      const size_t row = (size_t)batch * T + start;
      REGS for (int i = 0; i < ROWS; ++i) {
        const int j = i * NL + j0;
        const size_t t = start + (j < length ? j : 0);
        for (int ch = 0; ch < CPT; ++ch) {
          x_next[i][ch] = x[x0 + t * x_row + ch * x_step];
          dt_next[i][ch] = dt[dt0 + t * dt_row + ch * dt_step];
          if (HAS_Z && !SUMMARY) z_next[i][ch] = z[z0 + t * z_row + ch * z_step];
        }
      }
      REGS for (int i = 0; i < PAIRS; ++i) {
        const int e = i * THREADS + lid, f = e < length * N ? e : 0, t = start + f / N, n = f % N;
        b_next[i] = b[b0 + t * b_strides[1] + n * b_strides[2]];
        if (!SUMMARY) c_next[i] = c[c0 + t * c_strides[1] + n * c_strides[2]];
      }
      if (HAS_RESET) fresh_next = reset[row + (lid < length ? lid : 0)];
    }

    if (!AHEAD || k >= first_chunk) {
      const int start = k * TC, length = T - start < TC ? T - start : TC;
      const size_t row = (size_t)batch * T + start;
      // Role 2, NL steps at a time.
      UNROLL for (int j = 0; j < TC; j += NL) {
        float sum[NL][CPT];
        REGS for (int m = 0; m < NL; ++m) {
          if (HAS_RESET && fresh[j + m]) {
            REGS for (int n = 0; n < NS; ++n) { LANES for (int ch = 0; ch < CPT; ++ch) s[n][ch] = 0.0f; }
            open = 0.0f;
          }
          LANES for (int ch = 0; ch < CPT; ++ch) sum[m][ch] = 0.0f;
          REGS for (int n = 0; n < NS; ++n) {
            const float bn = bs[(j + m) * N + n0 + n], cn = cs[(j + m) * N + n0 + n];
            LANES for (int ch = 0; ch < CPT; ++ch) {
              s[n][ch] = fexp2(delta[j + m][c2 + ch] * a[n][ch]) * s[n][ch] + drive[j + m][c2 + ch] * bn;
              if (!SUMMARY) sum[m][ch] += s[n][ch] * cn;
            }
          }
          if (SUMMARY) { LANES for (int ch = 0; ch < CPT; ++ch) summed[ch] += delta[j + m][c2 + ch]; }
        }
        if (!SUMMARY) {
          // Over the channel's NL lanes: in each exchange a lane gives away half of its steps and sums the other half.
          UNROLL for (int o = NL / 2; o > 0; o >>= 1) {
            const bool upper = (q & o) != 0;
            UNROLL for (int m = 0; m < o; ++m) {
              UNROLL for (int ch = 0; ch < CPT; ++ch) {
                const float give = upper ? sum[m][ch] : sum[m + o][ch], keep = upper ? sum[m + o][ch] : sum[m][ch];
                sum[m][ch] = keep + SIMD_XOR(give, o);
              }
            }
          }
          LANES for (int ch = 0; ch < CPT; ++ch) out[j + q][c2 + ch] += sum[0][ch];
        }
      }
      TGBARRIER;

      // Role 1 again.
      if (!SUMMARY) {
        REGS for (int i = 0; i < TC / NL; ++i) {
          const int j = i * NL + j0;
          if (mine1 && j < length) {
            const size_t at = (row + j) * I + i1;
            LANES for (int ch = 0; ch < CPT; ++ch) ST(TX, y, at + ch, HAS_Z ? out[j][c1 + ch] * gate[i][ch] : out[j][c1 + ch]);
          }
        }
        TGBARRIER;
      }
    }
  }

  if (mine2 && (SUMMARY || segment == SEGS - 1)) {
    REGS for (int n = 0; n < NS; ++n) {
      for (int ch = 0; ch < CPT; ++ch) {
        state_out[((size_t)((SUMMARY ? segment * B : 0) + batch) * I + i2 + ch) * N + n0 + n] = s[n][ch];
      }
    }
    if (SUMMARY && q == 0) {
      for (int ch = 0; ch < CPT; ++ch) {
        total[(size_t)(segment * B + batch) * I + i2 + ch] = summed[ch];
        kept[(size_t)(segment * B + batch) * I + i2 + ch] = open;
      }
    }
  }
