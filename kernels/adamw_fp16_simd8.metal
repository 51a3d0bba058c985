// AdamW with 16-bit states, 8 neighbouring elements per thread, loaded and stored 16 bytes at a time: tensors that divide evenly
// into threadgroups, so that no bound is tested. See adamw_fp16_v2 for the states.
//
// Sizes: w, g, m, s [n], peak [n] with AMSGrad, n a multiple of 8 * threads; numbers [10].
// TG: the gradient's type. Arrays that start anywhere else than at 16 bytes are read element by element.
  const int x = thread_position_in_grid.x, begin = x * 8;
  const float lr = numbers[0], a = numbers[1], b = numbers[2], eps = numbers[3], decay = numbers[4];
  const float c1 = numbers[5], c2 = numbers[6], factor = numbers[7];
  const uint salt = k_f2u(numbers[8]), phase = k_f2u(numbers[9]);
  PACK(TW, 8) w8, new_w8;
  PACK(TG, 8) g8;
  PACK(TS, 8) m8, s8, peak8;
  K_LOAD8(TW, w8, w, x)
  K_LOAD8(TG, g8, g, x)
  K_LOAD8(TS, m8, m, x)
  K_LOAD8(TS, s8, s, x)
  K_LOAD8(TS, peak8, peak, AMSGRAD ? x : 0)
  REGS for (int k = 0; k < 8; ++k) {
    const float unscale = 0.0009765625f, old_peak = AMSGRAD ? LD(peak8.v, k) * unscale : 0.0f;
    const AdamW r = k_adamw_fast(
        LD(w8.v, k), LD(g8.v, k) * factor, LD(m8.v, k) * unscale, LD(s8.v, k) * unscale, old_peak, lr, a, b, eps, decay, c1, c2);
    const uint random = k_random((uint)(begin + k), salt, phase);
    ST(TW, new_w8.v, k, r.w);
    ST(TS, m8.v, k, k_saturate(r.m * 1024.0f));
    ST(TS, s8.v, k, k_round_half(r.s * 1024.0f, random));
    ST(TS, peak8.v, k, k_round_half(r.peak * 1024.0f, random));
  }
  ST_PACK(TW, 8, new_w, x, new_w8);
  ST_PACK(TS, 8, new_m, x, m8);
  ST_PACK(TS, 8, new_s, x, s8);
  if (AMSGRAD) ST_PACK(TS, 8, new_peak, AMSGRAD ? x : 0, peak8);
