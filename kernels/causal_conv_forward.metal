// Causal depthwise convolution, bias and silu: y_t = silu(bias + sum over m < K of weight[K-1-m] x_{t-m}).
// x before the first step comes from `state`, the K-1 inputs before it, or is zero. No tap reaches back past a reset.
//
// Sizes: x, y [B,T,I]; weight [I,K]; bias [I]; reset [B,T]; state [B,K-1,I].
// A thread makes STEPS time steps of CPT neighbouring channels of one batch row. Nothing is shared, so there are no barriers.
  const int T = x_shape[1], I = x_shape[2];
  const int i = thread_position_in_grid.x * CPT, start = thread_position_in_grid.y * STEPS, batch = thread_position_in_grid.z;
  if (i < I) {
    float w[K][CPT], offset[CPT];
    LANES for (int ch = 0; ch < CPT; ++ch) offset[ch] = LD(bias, i + ch);
    REGS for (int m = 0; m < K; ++m) {
      for (int ch = 0; ch < CPT; ++ch) w[m][ch] = LD(weight, (size_t)(i + ch) * K + K - 1 - m);
    }
    const int end = start + STEPS < T ? start + STEPS : T;
    for (int t = start; t < end; ++t) {
      float sum[CPT];
      LANES for (int ch = 0; ch < CPT; ++ch) sum[ch] = offset[ch];
      bool open = true;  // until a reset lies between the tap and t
      REGS for (int m = 0; m < K; ++m) {
        const int from = t - m;
        if (HAS_RESET && m > 0 && from + 1 >= 0 && reset[(size_t)batch * T + (from + 1 > 0 ? from + 1 : 0)] != 0) open = false;
        if (open && from >= 0) {
          const size_t at = ((size_t)batch * T + from) * I + i;
          LANES for (int ch = 0; ch < CPT; ++ch) sum[ch] += w[m][ch] * LD(x, at + ch);
        } else if (HAS_STATE && open) {
          const size_t at = ((size_t)batch * (K - 1) + K - 1 + from) * I + i;
          LANES for (int ch = 0; ch < CPT; ++ch) sum[ch] += w[m][ch] * LD(state, at + ch);
        }
      }
      const size_t at = ((size_t)batch * T + t) * I + i;
      LANES for (int ch = 0; ch < CPT; ++ch) ST(TX, y, at + ch, sum[ch] * k_sigmoid(sum[ch]));
    }
  }
