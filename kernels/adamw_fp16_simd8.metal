// AdamW with 16-bit states, 8 elements per thread (on a CPU a run of EPT): tensors that divide evenly into threadgroups, so that
// no bound is tested and eight loads of each array are under way at once. See adamw_fp16_v2 for the states.
//
// Sizes: w, g, m, s [n], peak [n] with AMSGrad, n a multiple of EPT * STRIDE; numbers [8]; key [1].
// Neighbouring threads take neighbouring elements: a thread's own lie STRIDE apart.
  const int x = thread_position_in_grid.x, begin = x / STRIDE * (STRIDE * EPT) + x % STRIDE;
  const float lr = numbers[0], a = numbers[1], b = numbers[2], eps = numbers[3], decay = numbers[4];
  const float c1 = numbers[5], c2 = numbers[6], factor = numbers[7];
  const uint salt = key[0];
  UNROLL LANES for (int k = 0; k < EPT; ++k) {
    const int i = begin + k * STRIDE;
    const float unscale = 0.0009765625f, old_peak = AMSGRAD ? LD(peak, AMSGRAD ? i : 0) * unscale : 0.0f;
    const AdamW r = k_adamw(LD(w, i), LD(g, i) * factor, LD(m, i) * unscale, LD(s, i) * unscale, old_peak, lr, a, b, eps, decay, c1, c2);
    const uint random = k_hash((uint)i * 0x9e3779b1u + salt);
    ST(TW, new_w, i, r.w);
    ST(TS, new_m, i, k_saturate(r.m * 1024.0f));
    ST(TS, new_s, i, k_round_half(r.s * 1024.0f, random));
    if (AMSGRAD) ST(TS, new_peak, AMSGRAD ? i : 0, k_round_half(r.peak * 1024.0f, random));
  }
