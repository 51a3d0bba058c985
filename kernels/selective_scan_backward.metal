// Selective scan, backward: the gradient of every input of selective_scan_forward, whose words it uses. With p_t = c_t . s_t + skip x_t,
//   h_t = dy_t silu(z_t)                    the gradient of p_t
//   g_t = h_t c_t + exp(d_{t+1} A) g_{t+1}  the gradient of s_t (cut where t+1 is a reset; from state_out's at the end)
//   u_t = exp(d_t A) s_{t-1}                what is left of the state (0 at a reset), so that s_t = u_t + d_t x_t b_t
//   dx = d (g . b) + skip h,   dd = x (g . b) + sum_n g A u,   ddt = dd softplus'(dt + dt_bias),   dz = dy p silu'(z)
//   db = sum_i g d x,   dc = sum_i h s,   dA = sum_t g u d,   dskip = sum h x,   ddt_bias = sum ddt
// Chunks run backwards; inside one, u is computed again from the state at its border. Every sum has a fixed order: no atomics.
// Sums over channels leave as one partial per threadgroup, sums over time as one per batch row; the caller adds those up.
//
// Sizes: dy, dx, ddt, dz [B,T,I]; db, dc [G,B,T,N] with G threadgroups; dstate_out, dstate, dA [B,I,N]; dskip, dbias [B,I].
  constexpr int NS = N / NL;
  constexpr int CG = SG * SIMD_W / NL * CPT;
  constexpr int THREADS = SG * SIMD_W;
  const int B = x_shape[0], T = x_shape[1], I = x_shape[2], K = (T + TC - 1) / TC;
  const int lid = thread_index_in_threadgroup, batch = thread_position_in_grid.y, group = threadgroup_position_in_grid.x;
  const int simdgroup = lid / SIMD_W, lane = lid % SIMD_W, first = group * CG;
  const int j0 = lid / (CG / CPT), c1 = lid % (CG / CPT) * CPT;
  const int q = lid % NL, n0 = q * NS, c2 = lid / NL * CPT;
  const bool mine1 = SIMD_W == 1 || first + c1 < I, mine2 = SIMD_W == 1 || first + c2 < I;
  const int i1 = mine1 ? first + c1 : I - CPT, i2 = mine2 ? first + c2 : I - CPT;

  threadgroup float delta[TC][CG], drive[TC][CG], h[TC][CG];   // d_t; d_t x_t; h_t
  threadgroup float gb[TC][CG], gau[TC][CG], cs_s[TC][CG];     // g . b; sum_n g A u (times log2 e); c . s
  threadgroup float bs[TC * N], cs[TC * N];
  threadgroup float db_part[SG][TC * N], dc_part[SG][TC * N];
  threadgroup int fresh[TC];

  float g[NS][CPT], a[NS][CPT], da[NS][CPT], bias[CPT], direct[CPT], dskip_sum[CPT], dbias_sum[CPT];
  float xs[TC / NL][CPT], slope[TC / NL][CPT], dgate[TC / NL][CPT];  // x_t; softplus'; dy_t silu'(z_t)
  REGS for (int n = 0; n < NS; ++n) {
    for (int ch = 0; ch < CPT; ++ch) {
      const size_t at = (size_t)(i2 + ch) * N + n0 + n;
      a[n][ch] = A[at] * LOG2E;
      g[n][ch] = HAS_DSTATE && mine2 ? dstate_out[(size_t)batch * I * N + at] : 0.0f;
      da[n][ch] = 0.0f;
    }
  }
  LANES for (int ch = 0; ch < CPT; ++ch) {
    bias[ch] = HAS_BIAS ? dt_bias[i1 + ch] : 0.0f;
    direct[ch] = HAS_SKIP ? skip[i1 + ch] : 0.0f;
    dskip_sum[ch] = 0.0f;
    dbias_sum[ch] = 0.0f;
  }

  for (int k = K - 1; k >= 0; --k) {
    const int start = k * TC, length = T - start < TC ? T - start : TC;
    const size_t row = (size_t)batch * T + start;
    float u[TC][NS][CPT], s[NS][CPT];
    REGS for (int n = 0; n < NS; ++n) {
      if (k > 0) {
        const size_t at = (((size_t)batch * (K - 1) + k - 1) * N + n0 + n) * I + i2;
        LANES for (int ch = 0; ch < CPT; ++ch) s[n][ch] = borders[at + ch];
      } else {
        const size_t at = ((size_t)batch * I + i2) * N + n0 + n;
        for (int ch = 0; ch < CPT; ++ch) s[n][ch] = HAS_STATE ? state[at + ch * N] : 0.0f;
      }
    }

    // Role 1: load. Steps past the end, and channels past the last, contribute nothing.
    REGS for (int i = 0; i < TC / NL; ++i) {
      const int j = i * NL + j0;
      const size_t at = (row + (j < length ? j : 0)) * I + i1;
      const float real = j < length ? 1.0f : 0.0f, counts = j < length && mine1 ? 1.0f : 0.0f;
      LANES for (int ch = 0; ch < CPT; ++ch) {
        const float xt = LD(x, at + ch), raw = LD(dt, at + ch) + bias[ch], dyt = LD(dy, at + ch) * counts;
        const float d = (HAS_BIAS ? k_softplus(raw) : raw) * real;
        xs[i][ch] = xt;
        slope[i][ch] = HAS_BIAS ? k_sigmoid(raw) : 1.0f;
        delta[j][c1 + ch] = d;
        drive[j][c1 + ch] = d * xt;
        float ht = dyt;
        if (HAS_Z) {
          const float zt = LD(z, at + ch), sig = k_sigmoid(zt);
          ht = dyt * zt * sig;
          dgate[i][ch] = dyt * sig * (1.0f + zt * (1.0f - sig));
        }
        h[j][c1 + ch] = ht;
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

    // Role 2: forwards through the chunk for u, then backwards for the gradients.
    UNROLL for (int j = 0; j < TC; ++j) {
      if (HAS_RESET && fresh[j]) {
        REGS for (int n = 0; n < NS; ++n) { LANES for (int ch = 0; ch < CPT; ++ch) s[n][ch] = 0.0f; }
      }
      REGS for (int n = 0; n < NS; ++n) {
        const float bn = bs[j * N + n0 + n];
        LANES for (int ch = 0; ch < CPT; ++ch) {
          u[j][n][ch] = fexp2(delta[j][c2 + ch] * a[n][ch]) * s[n][ch];
          s[n][ch] = u[j][n][ch] + drive[j][c2 + ch] * bn;
        }
      }
    }
    UNROLL for (int j = TC - 1; j >= 0; --j) {
      float sum_gb[CPT], sum_gau[CPT], sum_cs[CPT], db_n[NS], dc_n[NS];
      LANES for (int ch = 0; ch < CPT; ++ch) { sum_gb[ch] = 0.0f; sum_gau[ch] = 0.0f; sum_cs[ch] = 0.0f; }
      REGS for (int n = 0; n < NS; ++n) {
        const float bn = bs[j * N + n0 + n], cn = cs[j * N + n0 + n];
        float sum_db = 0.0f, sum_dc = 0.0f;
        LANES_SUM2(sum_db, sum_dc) for (int ch = 0; ch < CPT; ++ch) {
          const float d = delta[j][c2 + ch], in = drive[j][c2 + ch], ht = h[j][c2 + ch], ut = u[j][n][ch];
          const float st = ut + in * bn, gt = g[n][ch] + cn * ht, gu = gt * ut;
          sum_db += gt * in;
          sum_dc += ht * st;
          sum_gb[ch] += gt * bn;
          sum_gau[ch] += gu * a[n][ch];
          if (HAS_Z) sum_cs[ch] += st * cn;
          if (!FROZEN) da[n][ch] += gu * d;
          g[n][ch] = fexp2(d * a[n][ch]) * gt;
        }
        db_n[n] = sum_db;
        dc_n[n] = sum_dc;
      }
      if (HAS_RESET && fresh[j]) {
        REGS for (int n = 0; n < NS; ++n) { LANES for (int ch = 0; ch < CPT; ++ch) g[n][ch] = 0.0f; }
      }
      // Over the states: the NL lanes of a channel.
      for (int o = 1; o < NL; o <<= 1) {
        sum_gb[0] += SIMD_XOR(sum_gb[0], o);
        sum_gau[0] += SIMD_XOR(sum_gau[0], o);
        if (HAS_Z) sum_cs[0] += SIMD_XOR(sum_cs[0], o);
      }
      if (q == 0) {
        LANES for (int ch = 0; ch < CPT; ++ch) {
          gb[j][c2 + ch] = sum_gb[ch];
          gau[j][c2 + ch] = sum_gau[ch];
          cs_s[j][c2 + ch] = sum_cs[ch];
        }
      }
      // Over the channels of this simdgroup: in each exchange a lane gives away half of its values and sums the other half.
      int kept = NS, offset = 0, o = SIMD_W / 2;
      UNROLL for (; o >= NL && kept > 1; o >>= 1) {
        kept /= 2;
        const bool upper = (lane & o) != 0;
        for (int i = 0; i < kept; ++i) {
          const float give_b = upper ? db_n[i] : db_n[i + kept], keep_b = upper ? db_n[i + kept] : db_n[i];
          const float give_c = upper ? dc_n[i] : dc_n[i + kept], keep_c = upper ? dc_n[i + kept] : dc_n[i];
          db_n[i] = keep_b + SIMD_XOR(give_b, o);
          dc_n[i] = keep_c + SIMD_XOR(give_c, o);
        }
        offset += upper ? kept : 0;
      }
      UNROLL for (; o >= NL; o >>= 1) {
        db_n[0] += SIMD_XOR(db_n[0], o);
        dc_n[0] += SIMD_XOR(dc_n[0], o);
      }
      for (int i = 0; i < kept; ++i) {  // several lanes may write the same value to the same place
        db_part[simdgroup][j * N + n0 + offset + i] = db_n[i];
        dc_part[simdgroup][j * N + n0 + offset + i] = dc_n[i];
      }
    }
    TGBARRIER;

    // Role 1: store.
    REGS for (int i = 0; i < TC / NL; ++i) {
      const int j = i * NL + j0;
      if (mine1 && j < length) {
        const size_t at = (row + j) * I + i1;
        LANES for (int ch = 0; ch < CPT; ++ch) {
          const float ht = h[j][c1 + ch], gbt = gb[j][c1 + ch];
          const float ddt_t = (gau[j][c1 + ch] * LN2 + gbt * xs[i][ch]) * slope[i][ch];
          ST(TX, dx, at + ch, gbt * delta[j][c1 + ch] + direct[ch] * ht);
          ST(TDT, ddt, at + ch, ddt_t);
          if (HAS_Z) ST(TZ, dz, at + ch, dgate[i][ch] * (cs_s[j][c1 + ch] + direct[ch] * xs[i][ch]));
          if (!FROZEN) {
            dskip_sum[ch] += ht * xs[i][ch];
            dbias_sum[ch] += ddt_t;
          }
        }
      }
    }
    for (int e = lid; e < length * N; e += THREADS) {
      float sum_db = 0.0f, sum_dc = 0.0f;
      for (int g_i = 0; g_i < SG; ++g_i) {
        sum_db += db_part[g_i][e];
        sum_dc += dc_part[g_i][e];
      }
      const size_t at = (((size_t)group * B + batch) * T + start) * N + e;
      db[at] = sum_db;
      dc[at] = sum_dc;
    }
    TGBARRIER;
  }

  if (mine2) {
    REGS for (int n = 0; n < NS; ++n) {
      for (int ch = 0; ch < CPT; ++ch) {
        const size_t at = ((size_t)batch * I + i2 + ch) * N + n0 + n;
        if (HAS_STATE) dstate[at] = g[n][ch];
        if (!FROZEN) dA[at] = da[n][ch];
      }
    }
  }
  if (!FROZEN) {  // role 1's NL threads of a channel add up through the first rows of two arrays that are free now
    LANES for (int ch = 0; ch < CPT; ++ch) {
      delta[j0][c1 + ch] = dskip_sum[ch];
      drive[j0][c1 + ch] = dbias_sum[ch];
    }
    TGBARRIER;
    if (mine1 && j0 == 0) {
      for (int i = 1; i < NL; ++i) {
        LANES for (int ch = 0; ch < CPT; ++ch) {
          delta[0][c1 + ch] += delta[i][c1 + ch];
          drive[0][c1 + ch] += drive[i][c1 + ch];
        }
      }
      LANES for (int ch = 0; ch < CPT; ++ch) {
        dskip[(size_t)batch * I + i1 + ch] = delta[0][c1 + ch];
        dbias[(size_t)batch * I + i1 + ch] = drive[0][c1 + ch];
      }
    }
  }
