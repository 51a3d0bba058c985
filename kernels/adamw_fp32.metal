// AdamW with float32 states m and s = sqrt(v), EPT elements per thread.
//
// Sizes: w, g, m, s [n], peak [n] with AMSGrad; now [8], own [8], factor [8] as in magellano/ops/adamw.py.
  const int n = w_shape[0], begin = thread_position_in_grid.x * EPT, end = begin + EPT < n ? begin + EPT : n;
  K_STEP(1.0f)
  if (skip) {
    LANES for (int i = begin; i < end; ++i) {
      ST(TW, new_w, i, LD(w, i));
      new_m[i] = m[i];
      new_s[i] = s[i];
      if (AMSGRAD) new_peak[AMSGRAD ? i : 0] = peak[AMSGRAD ? i : 0];
    }
    return;
  }
  LANES for (int i = begin; i < end; ++i) {
    const float old_peak = AMSGRAD ? peak[AMSGRAD ? i : 0] : 0.0f;
    const AdamW r = k_adamw(LD(w, i), LD(g, i), m[i], s[i], old_peak, AMSGRAD, step);
    ST(TW, new_w, i, r.w);
    new_m[i] = r.m;
    new_s[i] = r.s;
    if (AMSGRAD) new_peak[AMSGRAD ? i : 0] = r.peak;
  }
