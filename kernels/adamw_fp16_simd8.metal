// AdamW with 16-bit states, PACKS times 8 neighbouring elements per thread, loaded and stored 16 bytes at a time: tensors that divide
// evenly into threadgroups, so that no bound is tested. Every load comes before the arithmetic and every store after it, so that all
// loads are under way at once: the compiler may not move them over a store itself. See adamw_fp16_v2 for the states.
//
// Sizes: w, g, m, s [n], peak [n] with AMSGrad, n a multiple of 8 * PACKS * threads; now [8], own [8], factor [8].
// TG: the gradient's type. Where one of the arrays starts anywhere else than at 16 bytes, all are read element by element.
  const int stride = threads_per_threadgroup.x;
  const int first = threadgroup_position_in_grid.x * PACKS * stride + thread_position_in_threadgroup.x;
  PACK(TW, 8) w8[PACKS];
  PACK(TG, 8) g8[PACKS];
  PACK(TS, 8) m8[PACKS], s8[PACKS], peak8[PACKS];
  if (PACKABLE(w) && PACKABLE(g) && PACKABLE(m) && PACKABLE(s) && PACKABLE(peak)) {
    REGS for (int p = 0; p < PACKS; ++p) {
      w8[p] = LD_PACK(TW, 8, w, first + p * stride);
      g8[p] = LD_PACK(TG, 8, g, first + p * stride);
      m8[p] = LD_PACK(TS, 8, m, first + p * stride);
      s8[p] = LD_PACK(TS, 8, s, first + p * stride);
      if (AMSGRAD) peak8[p] = LD_PACK(TS, 8, peak, AMSGRAD ? first + p * stride : 0);
    }
  } else {
    REGS for (int p = 0; p < PACKS; ++p) {
      REGS for (int k = 0; k < 8; ++k) {
        const int i = (first + p * stride) * 8 + k;
        w8[p].v[k] = w[i];
        g8[p].v[k] = g[i];
        m8[p].v[k] = m[i];
        s8[p].v[k] = s[i];
        if (AMSGRAD) peak8[p].v[k] = peak[AMSGRAD ? i : 0];
      }
    }
  }
  K_STEP(1024.0f)
  const uint phase = k_f2u(now4.v[3]), salt = k_f2u(own8.v[4]);
  if (skip) {
    REGS for (int p = 0; p < PACKS; ++p) {
      ST_PACK(TW, 8, new_w, first + p * stride, w8[p]);
      ST_PACK(TS, 8, new_m, first + p * stride, m8[p]);
      ST_PACK(TS, 8, new_s, first + p * stride, s8[p]);
      if (AMSGRAD) ST_PACK(TS, 8, new_peak, AMSGRAD ? first + p * stride : 0, peak8[p]);
    }
    return;
  }
  PACK(TW, 8) next_w8[PACKS];
  PACK(TS, 8) next_m8[PACKS], next_s8[PACKS], next_peak8[PACKS];
  REGS for (int p = 0; p < PACKS; ++p) {
    REGS for (int k = 0; k < 8; ++k) {
      const float old_peak = AMSGRAD ? LD(peak8[p].v, k) : 0.0f;
      const AdamW r = k_adamw_fast(LD(w8[p].v, k), LD(g8[p].v, k), LD(m8[p].v, k), LD(s8[p].v, k), old_peak, AMSGRAD, step);
      const uint random = k_random((uint)((first + p * stride) * 8 + k), salt, phase);
      ST(TW, next_w8[p].v, k, r.w);
      ST(TS, next_m8[p].v, k, k_saturate(r.m));
      ST_HALF_BITS(next_s8[p].v, k, k_round_half(r.s, random));
      if (AMSGRAD) ST_HALF_BITS(next_peak8[p].v, k, k_round_half(r.peak, random));
    }
  }
  REGS for (int p = 0; p < PACKS; ++p) {
    ST_PACK(TW, 8, new_w, first + p * stride, next_w8[p]);
    ST_PACK(TS, 8, new_m, first + p * stride, next_m8[p]);
    ST_PACK(TS, 8, new_s, first + p * stride, next_s8[p]);
    if (AMSGRAD) ST_PACK(TS, 8, new_peak, AMSGRAD ? first + p * stride : 0, next_peak8[p]);
  }
