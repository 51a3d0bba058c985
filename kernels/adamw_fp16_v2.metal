// AdamW with 16-bit states, one element per thread (on a CPU a run of EPT): tensors of any size.
// The states hold 2^10 m, rounded to nearest, and 2^10 sqrt(v), rounded stochastically (see adamw.h).
//
// Sizes: w, g, m, s [n], peak [n] with AMSGrad; numbers [10] as in magellano/ops/adamw.py.
  const int n = w_shape[0], begin = thread_position_in_grid.x * EPT, end = begin + EPT < n ? begin + EPT : n;
  const float lr = numbers[0], a = numbers[1], b = numbers[2], eps = numbers[3], decay = numbers[4];
  const float c1 = numbers[5], c2 = numbers[6], factor = numbers[7];
  const uint salt = k_f2u(numbers[8]), phase = k_f2u(numbers[9]);
  LANES for (int i = begin; i < end; ++i) {
    const float unscale = 0.0009765625f, old_peak = AMSGRAD ? LD(peak, AMSGRAD ? i : 0) * unscale : 0.0f;
    const AdamW r = k_adamw_fast(LD(w, i), LD(g, i) * factor, LD(m, i) * unscale, LD(s, i) * unscale, old_peak, lr, a, b, eps, decay, c1, c2);
    const uint random = k_random((uint)i, salt, phase);
    ST(TW, new_w, i, r.w);
    ST(TS, new_m, i, k_saturate(r.m * 1024.0f));
    ST(TS, new_s, i, k_round_half(r.s * 1024.0f, random));
    if (AMSGRAD) ST(TS, new_peak, AMSGRAD ? i : 0, k_round_half(r.peak * 1024.0f, random));
  }
