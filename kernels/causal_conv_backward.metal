// Causal depthwise convolution, backward. With p_t the sum before silu, computed again here, and h_t = dy_t silu'(p_t):
//   dx_t = sum over m < K of weight[K-1-m] h_{t+m},   dweight[K-1-m] = sum_t h_t x_{t-m},   dbias = sum_t h_t
// where a tap that a reset cuts off takes no part. dstate is dx of the K-1 inputs before the first step.
//
// Sizes: dy, dx [B,T,I], dy perhaps a view, like x; dstate [B,K-1,I]; dweight [P,I,K] and dbias [P,I], one partial for each of P = B chunks of time; the
// caller adds them up.
// As in the forward, a thread asks at once for all rows that STEPS time steps of CPT channels need: of x from K-1 steps before, of
// x and dy to K-1 steps after them, whose h reach into theirs. Then it walks backwards. It does so for PARTS such blocks in turn.
  constexpr int LATER = STEPS + K - 1;   // steps whose h are needed: step s is time start + s
  constexpr int ROWS = K - 1 + LATER;    // of x: row r is time start - (K-1) + r
  constexpr bool GPU = SIMD_W > 1, WIDE = GPU && CPT > 1;
  constexpr int PER = 4 / sizeof(TX), WORDS = (CPT + PER - 1) / PER;  // elements in a word of 32 bits, words in a row
  constexpr int PW = 16 / sizeof(TW), PB = 16 / sizeof(TBIAS);
  const int T = x_shape[1], I = x_shape[2], chunks = (T + STEPS * PARTS - 1) / (STEPS * PARTS);
  const int i = thread_position_in_grid.x * CPT, chunk = thread_position_in_grid.y, batch = thread_position_in_grid.z;
  if (i < I) {
    float w[K][CPT], dw[K][CPT], offset[CPT], dw_offset[CPT];
    if (WIDE && CPT * K % PW == 0 && PACKABLE(weight)) {
      REGS for (int p = 0; p < CPT * K / PW; ++p) {
        const PACK(TW, PW) pack = LD_PACK(TW, PW, weight, (size_t)i * K / PW + p);
        REGS for (int e = 0; e < PW; ++e) w[K - 1 - (p * PW + e) % K][(p * PW + e) / K] = LD(pack.v, e);
      }
    } else {
      REGS for (int m = 0; m < K; ++m) {
        for (int ch = 0; ch < CPT; ++ch) w[m][ch] = LD(weight, (size_t)(i + ch) * K + K - 1 - m);
      }
    }
    if (WIDE && CPT % PB == 0 && PACKABLE(bias)) {
      REGS for (int p = 0; p < CPT / PB; ++p) {
        const PACK(TBIAS, PB) pack = LD_PACK(TBIAS, PB, bias, i / PB + p);
        REGS for (int e = 0; e < PB; ++e) offset[p * PB + e] = LD(pack.v, e);
      }
    } else {
      LANES for (int ch = 0; ch < CPT; ++ch) offset[ch] = LD(bias, i + ch);
    }
    LANES for (int ch = 0; ch < CPT; ++ch) dw_offset[ch] = 0.0f;
    REGS for (int m = 0; m < K; ++m) { LANES for (int ch = 0; ch < CPT; ++ch) dw[m][ch] = 0.0f; }

    const size_t row = x_strides[1], next = SIMD_W == 1 ? 1 : x_strides[2], origin = batch * x_strides[0] + i * next;
    const size_t dy_row = dy_strides[1], dy_next = SIMD_W == 1 ? 1 : dy_strides[2], dy0 = batch * dy_strides[0] + i * dy_next;
    const bool packs = WIDE && next == 1 && row % CPT == 0 && origin % CPT == 0 && PACKABLE(x);
    const bool dy_packs = WIDE && dy_next == 1 && dy_row % CPT == 0 && dy0 % CPT == 0 && PACKABLE(dy);
    for (int start = chunk * PARTS * STEPS, part = 0; part < PARTS && start < T; ++part, start += STEPS) {
      PACK(uint, WORDS) rows[GPU ? ROWS : 1], from[GPU ? LATER : 1];
      if (packs) {
        REGS for (int r = 0; r < ROWS; ++r) {
          const int t = start - (K - 1) + r, at = t < 0 ? 0 : (t < T ? t : T - 1);
          rows[r] = LD_WORDS(WORDS, x, (origin + at * row) / CPT);
        }
      } else if (GPU) {
        REGS for (int r = 0; r < ROWS; ++r) {
          const int t = start - (K - 1) + r, at = t < 0 ? 0 : (t < T ? t : T - 1);
          REGS for (int q = 0; q < WORDS; ++q) rows[r].v[q] = 0;
          REGS for (int ch = 0; ch < CPT; ++ch) {
            rows[r].v[ch / PER] |= BITS(x, origin + at * row + ch * next) << ch % PER * 16;
          }
        }
      }
      if (dy_packs) {
        REGS for (int s = 0; s < LATER; ++s) {
          const int at = start + s < T ? start + s : T - 1;
          from[s] = LD_WORDS(WORDS, dy, (dy0 + at * dy_row) / CPT);
        }
      } else if (GPU) {
        REGS for (int s = 0; s < LATER; ++s) {
          const int at = start + s < T ? start + s : T - 1;
          REGS for (int q = 0; q < WORDS; ++q) from[s].v[q] = 0;
          REGS for (int ch = 0; ch < CPT; ++ch) {
            from[s].v[ch / PER] |= BITS(dy, dy0 + at * dy_row + ch * dy_next) << ch % PER * 16;
          }
        }
      }
      uint fresh[GPU ? ROWS / 32 + 1 : 1];  // bit r: a document starts in row r
      REGS for (int word = 0; GPU && word < ROWS / 32 + 1; ++word) fresh[word] = 0;
      REGS for (int r = 1; GPU && HAS_RESET && r < ROWS; ++r) {
        const int t = start - (K - 1) + r, at = t < 0 ? 0 : (t < T ? t : T - 1);
        if (reset[(size_t)batch * T + at] != 0 && t >= 0) fresh[r / 32] |= 1u << r % 32;
      }
      REGS for (int r = 0; GPU && !HAS_STATE && r < K - 1; ++r) {  // before the first step
        REGS for (int q = 0; q < WORDS; ++q) rows[r].v[q] = start - (K - 1) + r < 0 ? 0 : rows[r].v[q];
      }

      float due[K][CPT];  // due[m]: what has reached dx_{t-m} so far
      REGS for (int m = 0; m < K; ++m) { LANES for (int ch = 0; ch < CPT; ++ch) due[m][ch] = 0.0f; }
      REGS for (int s = LATER - 1; s >= 0; --s) {
        if (start + s < T) {
          float sum[CPT], taps[K][CPT], h[CPT];
          LANES for (int ch = 0; ch < CPT; ++ch) sum[ch] = offset[ch];
          bool open[K];  // until a reset lies between the tap and the step
          open[0] = true;
          REGS for (int m = 0; m < K; ++m) {
            const int r = K - 1 + s - m, from = start + s - m;
            if (m > 0) open[m] = open[m - 1];
            if (HAS_RESET && m > 0) {
              const bool same = GPU ? (fresh[(r + 1) / 32] >> (r + 1) % 32 & 1u) == 0 : from < -1 || reset[(size_t)batch * T + from + 1] == 0;
              open[m] = open[m] && same;
            }
            if (!open[m] || (!HAS_STATE && !GPU && from < 0)) {
              LANES for (int ch = 0; ch < CPT; ++ch) taps[m][ch] = 0.0f;
            } else if (GPU && (!HAS_STATE || r >= K - 1 || from >= 0)) {
              REGS for (int ch = 0; ch < CPT; ++ch) taps[m][ch] = LD_BITS(TX, rows[r].v[ch / PER], ch % PER);
            } else if (!HAS_STATE || from >= 0) {
              const size_t at = origin + from * row;
              LANES for (int ch = 0; ch < CPT; ++ch) taps[m][ch] = LD(x, at + ch);
            } else {
              const size_t at = ((size_t)batch * (K - 1) + K - 1 + from) * I + i;
              LANES for (int ch = 0; ch < CPT; ++ch) taps[m][ch] = LD(state, at + ch);
            }
            LANES for (int ch = 0; ch < CPT; ++ch) sum[ch] += w[m][ch] * taps[m][ch];
          }
          const size_t here = ((size_t)batch * T + start + s) * I + i;
          LANES for (int ch = 0; ch < CPT; ++ch) {
            const float sig = k_sigmoid(sum[ch]), dyt = GPU ? LD_BITS(TX, from[s].v[ch / PER], ch % PER) : LD(dy, dy0 + (start + s) * dy_row + ch);
            h[ch] = dyt * sig * (1.0f + sum[ch] * (1.0f - sig));
          }
          REGS for (int m = 0; m < K; ++m) {
            if (open[m]) { LANES for (int ch = 0; ch < CPT; ++ch) due[m][ch] += w[m][ch] * h[ch]; }
          }
          if (s < STEPS) {
            if (WIDE) {
              PACK(TX, CPT) made;
              REGS for (int ch = 0; ch < CPT; ++ch) ST(TX, made.v, ch, due[0][ch]);
              ST_PACK(TX, CPT, dx, here / CPT, made);
            } else {
              LANES for (int ch = 0; ch < CPT; ++ch) ST(TX, dx, here + ch, due[0][ch]);
            }
            if (!FROZEN) {
              LANES for (int ch = 0; ch < CPT; ++ch) dw_offset[ch] += h[ch];
              REGS for (int m = 0; m < K; ++m) { LANES for (int ch = 0; ch < CPT; ++ch) dw[m][ch] += h[ch] * taps[m][ch]; }
            }
          }
        }
        REGS for (int m = 0; m + 1 < K; ++m) { LANES for (int ch = 0; ch < CPT; ++ch) due[m][ch] = due[m + 1][ch]; }
        LANES for (int ch = 0; ch < CPT; ++ch) due[K - 1][ch] = 0.0f;
      }
      if (HAS_STATE && start == 0) {
        REGS for (int m = 0; m + 1 < K; ++m) {
          const size_t at = ((size_t)batch * (K - 1) + K - 2 - m) * I + i;
          LANES for (int ch = 0; ch < CPT; ++ch) ST(TS, dstate, at + ch, due[m][ch]);
        }
      }
    }
    if (!FROZEN) {
      const size_t part = ((size_t)batch * chunks + chunk) * I + i;
      LANES for (int ch = 0; ch < CPT; ++ch) dbias[part + ch] = dw_offset[ch];
      REGS for (int m = 0; m < K; ++m) {
        for (int ch = 0; ch < CPT; ++ch) dweight[(part + ch) * K + K - 1 - m] = dw[m][ch];
      }
    }
  }
