// Causal depthwise convolution, bias and silu: y_t = silu(bias + sum over m < K of weight[K-1-m] x_{t-m}).
// x before the first step comes from `state`, the K-1 inputs before it, or is zero. No tap reaches back past a reset.
//
// Sizes: x, y [B,T,I], x perhaps a view; weight [I,K]; bias [I]; reset [B,T]; state [B,K-1,I].
// A thread makes STEPS time steps of CPT neighbouring channels of one batch row. Nothing is shared, so there are no barriers.
// A GPU is bound by memory here: a thread asks for all its rows at once, in wide loads where x's place allows, and keeps them in
// registers as words of 32 bits. A CPU reads them when it needs them.
  constexpr int ROWS = K - 1 + STEPS;  // of x: row r is time step start - (K-1) + r
  constexpr bool GPU = SIMD_W > 1, WIDE = GPU && CPT > 1;
  constexpr int PER = 4 / sizeof(TX), WORDS = (CPT + PER - 1) / PER;  // elements in a word of 32 bits, words in a row
  constexpr int PW = 16 / sizeof(TW), PB = 16 / sizeof(TBIAS);
  const int T = x_shape[1], I = x_shape[2];
  const int i = thread_position_in_grid.x * CPT, start = thread_position_in_grid.y * STEPS, batch = thread_position_in_grid.z;
  if (i < I) {
    const size_t row = x_strides[1], next = SIMD_W == 1 ? 1 : x_strides[2], origin = batch * x_strides[0] + i * next;
    const bool packs = WIDE && next == 1 && row % CPT == 0 && origin % CPT == 0 && PACKABLE(x);
    PACK(uint, WORDS) rows[GPU ? ROWS : 1];
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
    uint fresh[GPU ? ROWS / 32 + 1 : 1];  // bit r: a document starts in row r
    REGS for (int word = 0; GPU && word < ROWS / 32 + 1; ++word) fresh[word] = 0;
    REGS for (int r = 1; GPU && HAS_RESET && r < ROWS; ++r) {
      const int t = start - (K - 1) + r, at = t < 0 ? 0 : (t < T ? t : T - 1);
      if (reset[(size_t)batch * T + at] != 0 && t >= 0) fresh[r / 32] |= 1u << r % 32;
    }

    float w[K][CPT], offset[CPT];
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

    REGS for (int r = 0; GPU && !HAS_STATE && r < K - 1; ++r) {  // before the first step
      REGS for (int q = 0; q < WORDS; ++q) rows[r].v[q] = start - (K - 1) + r < 0 ? 0 : rows[r].v[q];
    }
    REGS for (int j = 0; j < STEPS; ++j) {
      if (start + j < T) {
        float sum[CPT];
        LANES for (int ch = 0; ch < CPT; ++ch) sum[ch] = offset[ch];
        bool open = true;  // until a reset lies between the tap and the step
        REGS for (int m = 0; m < K; ++m) {
          const int r = K - 1 + j - m, from = start + j - m;
          if (HAS_RESET && m > 0) {
            const bool same = GPU ? (fresh[(r + 1) / 32] >> (r + 1) % 32 & 1u) == 0 : from < -1 || reset[(size_t)batch * T + from + 1] == 0;
            open = open && same;
          }
          if (open && GPU && (!HAS_STATE || r >= K - 1 || from >= 0)) {
            REGS for (int ch = 0; ch < CPT; ++ch) sum[ch] += w[m][ch] * LD_BITS(TX, rows[r].v[ch / PER], ch % PER);
          } else if (open && from >= 0) {
            const size_t at = origin + from * row;
            LANES for (int ch = 0; ch < CPT; ++ch) sum[ch] += w[m][ch] * LD(x, at + ch);
          } else if (open && HAS_STATE) {
            const size_t at = ((size_t)batch * (K - 1) + K - 1 + from) * I + i;
            LANES for (int ch = 0; ch < CPT; ++ch) sum[ch] += w[m][ch] * LD(state, at + ch);
          }
        }
        const size_t at = ((size_t)batch * T + start + j) * I + i;
        if (WIDE) {
          PACK(TX, CPT) made;
          REGS for (int ch = 0; ch < CPT; ++ch) ST(TX, made.v, ch, sum[ch] * k_sigmoid(sum[ch]));
          ST_PACK(TX, CPT, y, at / CPT, made);
        } else {
          LANES for (int ch = 0; ch < CPT; ++ch) ST(TX, y, at + ch, sum[ch] * k_sigmoid(sum[ch]));
        }
      }
    }
  }
