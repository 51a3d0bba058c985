// Selective scan, backward: the gradient of every input of selective_scan_forward, whose words it uses. With p_t = c_t . s_t + skip x_t,
//   h_t = dy_t silu(z_t)                    the gradient of p_t
//   g_t = h_t c_t + exp(d_{t+1} A) g_{t+1}  the gradient of s_t (cut where t+1 is a reset; from state_out's at the end)
//   u_t = exp(d_t A) s_{t-1}                what is left of the state (0 at a reset), so that s_t = u_t + d_t x_t b_t
//   dx = d (g . b) + skip h,   dd = x (g . b) + sum_n g A u,   ddt = dd softplus'(dt + dt_bias),   dz = dy p silu'(z)
//   db = sum_i g d x,   dc = sum_i h s,   dA = sum_t g u d,   dskip = sum h x,   ddt_bias = sum ddt
// Chunks run backwards; inside one, u is computed again from the state at its border. Every sum has a fixed order: no atomics.
// Sums over channels leave as one partial per threadgroup, sums over time as one per segment and batch row; the caller adds those.
// Segments are as in the forward, the other way round: a launch with SUMMARY finds for all but the first segment the gradient that
// leaves it at its start if none enters at its end (dstate [SEGS,B,I,N]), total and kept; the next launch takes these as ends,
// totals, keeps.
//
// Sizes: dy, dx, ddt, dz [B,T,I]; db, dc [G,B,T,N] with G threadgroups; dstate_out, dstate [B,I,N]; dA [SEGS,B,I,N];
// dskip, dbias [SEGS,B,I].
  constexpr int NS = N / NL;
  constexpr int CG = SG * SIMD_W / NL * CPT;
  constexpr int THREADS = SG * SIMD_W;
  constexpr int ROWS = AHEAD ? TC / NL : 1, PAIRS = AHEAD ? (TC * N + THREADS - 1) / THREADS : 1;
  const int B = x_shape[0], T = x_shape[1], I = x_shape[2], K = (T + TC - 1) / TC;
  const int lid = thread_index_in_threadgroup, batch = threadgroup_position_in_grid.y, group = threadgroup_position_in_grid.x;
  const int simdgroup = lid / SIMD_W, lane = lid % SIMD_W, first = group * CG;
  const int segment = threadgroup_position_in_grid.z + SUMMARY, per_segment = (K + SEGS - 1) / SEGS;
  const int first_chunk = segment * per_segment, last_chunk = first_chunk + per_segment < K ? first_chunk + per_segment : K;
  const int j0 = lid / (CG / CPT), c1 = lid % (CG / CPT) * CPT;
  const int q = lid % NL, n0 = q * NS, c2 = lid / NL * CPT;
  const bool mine1 = SIMD_W == 1 || first + c1 < I, mine2 = SIMD_W == 1 || first + c2 < I;
  const int i1 = mine1 ? first + c1 : I - CPT, i2 = mine2 ? first + c2 : I - CPT;

  const size_t x_step = SIMD_W == 1 ? 1 : x_strides[2], x_row = x_strides[1], x0 = batch * x_strides[0] + i1 * x_step;
  const size_t dt_step = SIMD_W == 1 ? 1 : dt_strides[2], dt_row = dt_strides[1], dt0 = batch * dt_strides[0] + i1 * dt_step;
  const size_t dy_step = SIMD_W == 1 ? 1 : dy_strides[2], dy_row = dy_strides[1], dy0 = batch * dy_strides[0] + i1 * dy_step;
  const size_t z_step = SIMD_W == 1 || !HAS_Z ? 1 : z_strides[2], z_row = HAS_Z ? z_strides[1] : 0;
  const size_t z0 = HAS_Z ? batch * z_strides[0] + i1 * z_step : 0, b0 = batch * b_strides[0], c0 = batch * c_strides[0];

  threadgroup float delta[TC][CG], drive[TC][CG], h[TC][CG];   // d_t; d_t x_t; h_t
  threadgroup float gb[TC][CG], gau[TC][CG], cs_s[TC][CG];     // g . b; sum_n g A u (times log2 e); c . s
  threadgroup float bs[TC * N], cs[TC * N];
  threadgroup float db_part[SG][TC * N], dc_part[SG][TC * N];
  threadgroup int fresh[TC];

  float g[NS][CPT], a[NS][CPT], da[NS][CPT], bias[CPT], direct[CPT], dskip_sum[CPT], dbias_sum[CPT];
  float xs[TC / NL][CPT], slope[TC / NL][CPT], dgate[TC / NL][CPT];  // x_t; softplus'; dy_t silu'(z_t)
  float s_next[NS][CPT], summed[CPT], open = 1.0f;
  TX x_next[ROWS][CPT];
  TDT dt_next[ROWS][CPT];
  TX dy_next[ROWS][CPT];
  TZ z_next[ROWS][CPT];
  TB b_next[PAIRS];
  TCC c_next[PAIRS];
  int fresh_next = 0;
  REGS for (int n = 0; n < NS; ++n) {
    for (int ch = 0; ch < CPT; ++ch) {
      const size_t at = (size_t)(i2 + ch) * N + n0 + n;
      a[n][ch] = (LOG_A ? -k_exp(LD(A, at)) : LD(A, at)) * LOG2E;
      g[n][ch] = HAS_DSTATE && !SUMMARY && mine2 ? dstate_out[(size_t)batch * I * N + at] : 0.0f;
      da[n][ch] = 0.0f;
    }
  }
  for (int later = SEGS - 1; SEGS > 1 && !SUMMARY && mine2 && later > segment; --later) {
    for (int ch = 0; ch < CPT; ++ch) {
      const size_t at = (size_t)(later * B + batch) * I + i2 + ch;
      const float whole = totals[at], keep = keeps[at];
      REGS for (int n = 0; n < NS; ++n) g[n][ch] = fexp2(whole * a[n][ch]) * keep * g[n][ch] + ends[at * N + n0 + n];
    }
  }
  LANES for (int ch = 0; ch < CPT; ++ch) {
    bias[ch] = HAS_BIAS ? LD(dt_bias, i1 + ch) : 0.0f;
    direct[ch] = HAS_SKIP ? LD(skip, i1 + ch) : 0.0f;
    dskip_sum[ch] = 0.0f;
    dbias_sum[ch] = 0.0f;
    summed[ch] = 0.0f;
  }

  for (int k = last_chunk - 1 + AHEAD; k >= first_chunk; --k) {
    const int start = k * TC, length = T - start < TC ? T - start : TC;
    const size_t row = (size_t)batch * T + start;
    float u[TC][NS][CPT], s[NS][CPT];
    if (!AHEAD || k < last_chunk) {
      REGS for (int n = 0; n < NS; ++n) {
        if (SUMMARY) continue;
        if (k > 0) {
          const size_t at = (((size_t)batch * (K - 1) + k - 1) * N + n0 + n) * I + i2;
          LANES for (int ch = 0; ch < CPT; ++ch) s[n][ch] = AHEAD ? s_next[n][ch] : borders[at + ch];
        } else {
          const size_t at = ((size_t)batch * I + i2) * N + n0 + n;
          for (int ch = 0; ch < CPT; ++ch) s[n][ch] = HAS_STATE ? state[at + ch * N] : 0.0f;
        }
      }

      // Role 1: load. Steps past the end, and channels past the last, contribute nothing.
      REGS for (int i = 0; i < TC / NL; ++i) {
        const int j = i * NL + j0;
        const size_t t = start + (j < length ? j : 0);
        const float real = j < length ? 1.0f : 0.0f, counts = j < length && mine1 ? 1.0f : 0.0f;
        LANES for (int ch = 0; ch < CPT; ++ch) {
          const float xt = SUMMARY ? 0.0f : AHEAD ? LD(x_next[i], ch) : LD(x, x0 + t * x_row + ch);
          const float raw = (AHEAD ? LD(dt_next[i], ch) : LD(dt, dt0 + t * dt_row + ch)) + bias[ch];
          const float dyt = (AHEAD ? LD(dy_next[i], ch) : LD(dy, dy0 + t * dy_row + ch)) * counts;
          const float d = (HAS_BIAS ? k_softplus(raw) : raw) * real;
          xs[i][ch] = xt;
          slope[i][ch] = HAS_BIAS ? k_sigmoid(raw) : 1.0f;
          delta[j][c1 + ch] = d;
          drive[j][c1 + ch] = d * xt;
          float ht = dyt;
          if (HAS_Z) {
            const float zt = AHEAD ? LD(z_next[i], ch) : LD(z, z0 + t * z_row + ch), sig = k_sigmoid(zt);
            ht = dyt * zt * sig;
            dgate[i][ch] = dyt * sig * (1.0f + zt * (1.0f - sig));
          }
          h[j][c1 + ch] = ht;
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

    if (AHEAD && k > first_chunk) {
      const int before = start - TC, there = T - before < TC ? T - before : TC;
      const size_t row_before = (size_t)batch * T + before;
      REGS for (int i = 0; i < ROWS; ++i) {
        const int j = i * NL + j0;
        const size_t t = before + (j < there ? j : 0);
        for (int ch = 0; ch < CPT; ++ch) {
          if (!SUMMARY) x_next[i][ch] = x[x0 + t * x_row + ch * x_step];
          dt_next[i][ch] = dt[dt0 + t * dt_row + ch * dt_step];
          dy_next[i][ch] = dy[dy0 + t * dy_row + ch * dy_step];
          if (HAS_Z) z_next[i][ch] = z[z0 + t * z_row + ch * z_step];
        }
      }
      REGS for (int i = 0; i < PAIRS; ++i) {
        const int e = i * THREADS + lid, f = e < there * N ? e : 0, t = before + f / N, n = f % N;
        if (!SUMMARY) b_next[i] = b[b0 + t * b_strides[1] + n * b_strides[2]];
        c_next[i] = c[c0 + t * c_strides[1] + n * c_strides[2]];
      }
      if (HAS_RESET) fresh_next = reset[row_before + (lid < there ? lid : 0)];
      if (!SUMMARY && k > 1) {
        REGS for (int n = 0; n < NS; ++n) {
          const size_t at = (((size_t)batch * (K - 1) + k - 2) * N + n0 + n) * I + i2;
          for (int ch = 0; ch < CPT; ++ch) s_next[n][ch] = borders[at + ch];
        }
      }
    }
    if (AHEAD && k == last_chunk) continue;

    if (SUMMARY) {
      UNROLL for (int j = TC - 1; j >= 0; --j) {
        REGS for (int n = 0; n < NS; ++n) {
          const float cn = cs[j * N + n0 + n];
          LANES for (int ch = 0; ch < CPT; ++ch) {
            g[n][ch] = fexp2(delta[j][c2 + ch] * a[n][ch]) * (g[n][ch] + cn * h[j][c2 + ch]);
          }
        }
        LANES for (int ch = 0; ch < CPT; ++ch) summed[ch] += delta[j][c2 + ch];
        if (HAS_RESET && fresh[j]) {
          REGS for (int n = 0; n < NS; ++n) { LANES for (int ch = 0; ch < CPT; ++ch) g[n][ch] = 0.0f; }
          open = 0.0f;
        }
      }
      TGBARRIER;
      continue;
    }

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
    UNROLL for (int j = TC - NL; j >= 0; j -= NL) {  // NL steps at a time, whose sums over the states are exchanged together
      float sum_gb[NL][CPT], sum_gau[NL][CPT], sum_cs[NL][CPT];
      UNROLL for (int m = NL - 1; m >= 0; --m) {
        float db_n[NS], dc_n[NS];
        LANES for (int ch = 0; ch < CPT; ++ch) { sum_gb[m][ch] = 0.0f; sum_gau[m][ch] = 0.0f; sum_cs[m][ch] = 0.0f; }
        REGS for (int n = 0; n < NS; ++n) {
          const float bn = bs[(j + m) * N + n0 + n], cn = cs[(j + m) * N + n0 + n];
          float sum_db = 0.0f, sum_dc = 0.0f;
          LANES_SUM2(sum_db, sum_dc) for (int ch = 0; ch < CPT; ++ch) {
            const float d = delta[j + m][c2 + ch], in = drive[j + m][c2 + ch], ht = h[j + m][c2 + ch], ut = u[j + m][n][ch];
            const float st = ut + in * bn, gt = g[n][ch] + cn * ht, gu = gt * ut;
            sum_db += gt * in;
            sum_dc += ht * st;
            sum_gb[m][ch] += gt * bn;
            sum_gau[m][ch] += gu * a[n][ch];
            if (HAS_Z) sum_cs[m][ch] += st * cn;
            if (!FROZEN) da[n][ch] += gu * d;
            g[n][ch] = fexp2(d * a[n][ch]) * gt;
          }
          db_n[n] = sum_db;
          dc_n[n] = sum_dc;
        }
        if (HAS_RESET && fresh[j + m]) {
          REGS for (int n = 0; n < NS; ++n) { LANES for (int ch = 0; ch < CPT; ++ch) g[n][ch] = 0.0f; }
        }
        // Over the channels of this simdgroup: in each exchange a lane gives away half of its values and sums the other half.
        int kept_n = NS, offset = 0, o = SIMD_W / 2;
        UNROLL for (; o >= NL && kept_n > 1; o >>= 1) {
          kept_n /= 2;
          const bool upper = (lane & o) != 0;
          for (int i = 0; i < kept_n; ++i) {
            const float give_b = upper ? db_n[i] : db_n[i + kept_n], keep_b = upper ? db_n[i + kept_n] : db_n[i];
            const float give_c = upper ? dc_n[i] : dc_n[i + kept_n], keep_c = upper ? dc_n[i + kept_n] : dc_n[i];
            db_n[i] = keep_b + SIMD_XOR(give_b, o);
            dc_n[i] = keep_c + SIMD_XOR(give_c, o);
          }
          offset += upper ? kept_n : 0;
        }
        UNROLL for (; o >= NL; o >>= 1) {
          db_n[0] += SIMD_XOR(db_n[0], o);
          dc_n[0] += SIMD_XOR(dc_n[0], o);
        }
        for (int i = 0; i < kept_n; ++i) {  // several lanes may write the same value to the same place
          db_part[simdgroup][(j + m) * N + n0 + offset + i] = db_n[i];
          dc_part[simdgroup][(j + m) * N + n0 + offset + i] = dc_n[i];
        }
      }
      // Over the states: the NL lanes of a channel exchange steps in the same way; lane q ends with step j + q.
      UNROLL for (int o = NL / 2; o > 0; o >>= 1) {
        const bool upper = (q & o) != 0;
        UNROLL for (int m = 0; m < o; ++m) {
          UNROLL for (int ch = 0; ch < CPT; ++ch) {
            const float give_gb = upper ? sum_gb[m][ch] : sum_gb[m + o][ch], keep_gb = upper ? sum_gb[m + o][ch] : sum_gb[m][ch];
            const float give_gau = upper ? sum_gau[m][ch] : sum_gau[m + o][ch];
            const float keep_gau = upper ? sum_gau[m + o][ch] : sum_gau[m][ch];
            const float give_cs = upper ? sum_cs[m][ch] : sum_cs[m + o][ch], keep_cs = upper ? sum_cs[m + o][ch] : sum_cs[m][ch];
            sum_gb[m][ch] = keep_gb + SIMD_XOR(give_gb, o);
            sum_gau[m][ch] = keep_gau + SIMD_XOR(give_gau, o);
            if (HAS_Z) sum_cs[m][ch] = keep_cs + SIMD_XOR(give_cs, o);
          }
        }
      }
      LANES for (int ch = 0; ch < CPT; ++ch) {
        gb[j + q][c2 + ch] = sum_gb[0][ch];
        gau[j + q][c2 + ch] = sum_gau[0][ch];
        cs_s[j + q][c2 + ch] = sum_cs[0][ch];
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

  const size_t part = (size_t)segment * B + batch;
  if (mine2) {
    REGS for (int n = 0; n < NS; ++n) {
      for (int ch = 0; ch < CPT; ++ch) {
        const size_t at = (size_t)(i2 + ch) * N + n0 + n;
        if (SUMMARY || (HAS_STATE && segment == 0)) dstate[(SUMMARY ? part : (size_t)batch) * I * N + at] = g[n][ch];
        if (!FROZEN && !SUMMARY) dA[part * I * N + at] = da[n][ch];
      }
    }
    if (SUMMARY && q == 0) {
      for (int ch = 0; ch < CPT; ++ch) {
        total[part * I + i2 + ch] = summed[ch];
        kept[part * I + i2 + ch] = open;
      }
    }
  }
  if (!FROZEN && !SUMMARY) {  // role 1's NL threads of a channel add up through the first rows of two arrays that are free now
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
        dskip[part * I + i1 + ch] = delta[0][c1 + ch];
        dbias[part * I + i1 + ch] = drive[0][c1 + ch];
      }
    }
  }
