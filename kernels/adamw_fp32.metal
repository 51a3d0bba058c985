// AdamW with float32 states m and s = sqrt(v), EPT elements per thread.
//
// Sizes: w, g, m, s [n], peak [n] with AMSGrad; numbers [10] as in magellano/ops/adamw.py.
  const int n = w_shape[0], begin = thread_position_in_grid.x * EPT, end = begin + EPT < n ? begin + EPT : n;
  const float lr = numbers[0], a = numbers[1], b = numbers[2], eps = numbers[3], decay = numbers[4];
  const float c1 = numbers[5], c2 = numbers[6], factor = numbers[7];
  LANES for (int i = begin; i < end; ++i) {
    const float old_peak = AMSGRAD ? peak[AMSGRAD ? i : 0] : 0.0f;
    const AdamW r = k_adamw(LD(w, i), LD(g, i) * factor, m[i], s[i], old_peak, lr, a, b, eps, decay, c1, c2);
    ST(TW, new_w, i, r.w);
    new_m[i] = r.m;
    new_s[i] = r.s;
    if (AMSGRAD) new_peak[AMSGRAD ? i : 0] = r.peak;
  }
