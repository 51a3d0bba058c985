// AdamW with 16-bit states, one element per thread (on a CPU a run of EPT): tensors of any size.
// The states hold 2^10 m, rounded to nearest, and 2^10 sqrt(v), rounded stochastically (see adamw.h).
//
// Sizes: w, g, m, s [n], peak [n] with AMSGrad; now [8], own [8], factor [8] as in magellano/ops/adamw.py.
  const int n = w_shape[0], begin = thread_position_in_grid.x * EPT, end = begin + EPT < n ? begin + EPT : n;
  K_STEP(1024.0f)
  const uint phase = k_f2u(now4.v[3]), salt = k_f2u(own8.v[4]);
  if (skip) {
    LANES for (int i = begin; i < end; ++i) {
      ST(TW, new_w, i, LD(w, i));
      ST(TS, new_m, i, LD(m, i));
      ST(TS, new_s, i, LD(s, i));
      if (AMSGRAD) ST(TS, new_peak, AMSGRAD ? i : 0, LD(peak, AMSGRAD ? i : 0));
    }
    return;
  }
  LANES for (int i = begin; i < end; ++i) {
    const float old_peak = AMSGRAD ? LD(peak, AMSGRAD ? i : 0) : 0.0f;
    const AdamW r = k_adamw_fast(LD(w, i), LD(g, i), LD(m, i), LD(s, i), old_peak, AMSGRAD, step);
    const uint random = k_random((uint)i, salt, phase);
    ST(TW, new_w, i, r.w);
    ST(TS, new_m, i, k_saturate(r.m));
    ST_HALF_BITS(new_s, i, k_round_half(r.s, random));
    if (AMSGRAD) ST_HALF_BITS(new_peak, AMSGRAD ? i : 0, k_round_half(r.peak, random));
  }
