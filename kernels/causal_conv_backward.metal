// Causal depthwise convolution, backward. With p_t the sum before silu, computed again here, and h_t = dy_t silu'(p_t):
//   dx_t = sum over m < K of weight[K-1-m] h_{t+m},   dweight[K-1-m] = sum_t h_t x_{t-m},   dbias = sum_t h_t
// where a tap that a reset cuts off takes no part. dstate is dx of the K-1 inputs before the first step.
//
// Sizes: dy, dx [B,T,I]; dstate [B,K-1,I]; dweight [P,I,K] and dbias [P,I], one partial for each of P = B chunks of time; the
// caller adds them up.
// A thread walks backwards through STEPS time steps of CPT channels, beginning K-1 steps later, whose h reach into its own.
  const int T = x_shape[1], I = x_shape[2], chunks = (T + STEPS - 1) / STEPS;
  const int i = thread_position_in_grid.x * CPT, chunk = thread_position_in_grid.y, batch = thread_position_in_grid.z;
  if (i < I) {
    float w[K][CPT], dw[K][CPT], offset[CPT], dw_offset[CPT];
    float due[K][CPT];  // due[m]: what has reached dx_{t-m} so far
    LANES for (int ch = 0; ch < CPT; ++ch) { offset[ch] = LD(bias, i + ch); dw_offset[ch] = 0.0f; }
    REGS for (int m = 0; m < K; ++m) {
      for (int ch = 0; ch < CPT; ++ch) w[m][ch] = LD(weight, (size_t)(i + ch) * K + K - 1 - m);
      LANES for (int ch = 0; ch < CPT; ++ch) { dw[m][ch] = 0.0f; due[m][ch] = 0.0f; }
    }
    const int start = chunk * STEPS, end = start + STEPS < T ? start + STEPS : T;
    const int last = end + K - 2 < T - 1 ? end + K - 2 : T - 1;
    for (int t = last; t >= start; --t) {
      float sum[CPT], taps[K][CPT], h[CPT];
      LANES for (int ch = 0; ch < CPT; ++ch) sum[ch] = offset[ch];
      int reach = K;  // how many taps stand before a reset cuts them off
      REGS for (int m = 0; m < K; ++m) {
        const int from = t - m;
        if (HAS_RESET && m > 0 && m < reach && from + 1 >= 0 && reset[(size_t)batch * T + (from + 1 > 0 ? from + 1 : 0)] != 0) reach = m;
        if (m < reach && from >= 0) {
          const size_t at = ((size_t)batch * T + from) * I + i;
          LANES for (int ch = 0; ch < CPT; ++ch) taps[m][ch] = LD(x, at + ch);
        } else if (HAS_STATE && m < reach) {
          const size_t at = ((size_t)batch * (K - 1) + K - 1 + from) * I + i;
          LANES for (int ch = 0; ch < CPT; ++ch) taps[m][ch] = LD(state, at + ch);
        } else {
          LANES for (int ch = 0; ch < CPT; ++ch) taps[m][ch] = 0.0f;
        }
        LANES for (int ch = 0; ch < CPT; ++ch) sum[ch] += w[m][ch] * taps[m][ch];
      }
      const size_t here = ((size_t)batch * T + t) * I + i;
      LANES for (int ch = 0; ch < CPT; ++ch) {
        const float sig = k_sigmoid(sum[ch]);
        h[ch] = LD(dy, here + ch) * sig * (1.0f + sum[ch] * (1.0f - sig));
      }
      REGS for (int m = 0; m < K; ++m) {
        if (m < reach) { LANES for (int ch = 0; ch < CPT; ++ch) due[m][ch] += w[m][ch] * h[ch]; }
      }
      if (t < end) {
        LANES for (int ch = 0; ch < CPT; ++ch) ST(TX, dx, here + ch, due[0][ch]);
        if (!FROZEN) {
          LANES for (int ch = 0; ch < CPT; ++ch) dw_offset[ch] += h[ch];
          REGS for (int m = 0; m < K; ++m) { LANES for (int ch = 0; ch < CPT; ++ch) dw[m][ch] += h[ch] * taps[m][ch]; }
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
    if (!FROZEN) {
      const size_t part = ((size_t)batch * chunks + chunk) * I + i;
      LANES for (int ch = 0; ch < CPT; ++ch) dbias[part + ch] = dw_offset[ch];
      REGS for (int m = 0; m < K; ++m) {
        for (int ch = 0; ch < CPT; ++ch) dweight[(part + ch) * K + K - 1 - m] = dw[m][ch];
      }
    }
  }
