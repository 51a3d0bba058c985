// One step of the causal convolution + bias + silu (causal_conv.py), with its state: y = silu(bias + sum_k weight[k] (state, x)[k]).
//
// Sizes: x [B, WIDTH I], of which the first I count; weight [I,K]; bias [I]; state, next [B, K-1, I]; y [B,I].
// A thread has CPT neighbouring channels of one row.
  const int I = bias_shape[0], row = thread_position_in_grid.y, first = thread_position_in_grid.x * CPT;
  const int count = I - first < CPT ? I - first : CPT;
  LANES for (int j = 0; j < count; ++j) {
    const int i = first + j;
    const float now = LD(x, (size_t)row * WIDTH * I + i);
    float all = LD(bias, i) + LD(weight, i * K + K - 1) * now;
    UNROLL for (int k = 0; k < K - 1; ++k) {
      const float past = LD(state, ((size_t)row * (K - 1) + k) * I + i);
      all += LD(weight, i * K + k) * past;
    }
    ST(T, y, (size_t)row * I + i, all * k_sigmoid(all));
  }
  UNROLL for (int k = 0; k < K - 1; ++k) {
    LANES for (int j = 0; j < count; ++j) {
      const size_t to = ((size_t)row * (K - 1) + k) * I + first + j;
      const float moved = k + 1 < K - 1 ? LD(state, to + (k + 1 < K - 1 ? I : 0)) : LD(x, (size_t)row * WIDTH * I + first + j);
      ST(T, next, to, moved);
    }
  }
