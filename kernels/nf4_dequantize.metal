// NF4 back to floats: value[code] * factor of its block of 64. Codes are read V at a time, as one word.
// The factor is given (factor [P]), or with EXPAND made here: scales[scale_codes[block]] * scale_absmax[block / 256] + offset.
//
// Sizes for n words: codes [n]; scale_codes [P]; scale_absmax [ceil(P/256)]; offset [1 or more]; scales [256]; values [16]; out [n V]
// of type T. P = ceil(n V / 64). With EACH > 0 codes hold matrices of EACH blocks behind each other, with an offset and
// ceil(EACH/256) maxima of their own, and out gets those whose numbers stand in which,
// behind how many they are.
// A threadgroup makes UNITS times THREADS runs of RUN words; a run lies in one block.
  const int n = EACH > 0 ? which[0] * EACH * (64 / V) : codes_shape[0], lid = thread_index_in_threadgroup, group = threadgroup_position_in_grid.x;
  threadgroup float value[16 * SIMD_W];  // a copy for each lane, so that lanes never wait for each other's bank
  for (int i = lid; i < 16 * SIMD_W; i += THREADS) value[i] = values[i / SIMD_W];
  TGBARRIER;
  if (SIMD_W == 1) {
    for (int unit = 0; unit < UNITS; ++unit) {
      const int start = ((group * UNITS + unit) * THREADS + lid) * RUN, count = n - start < RUN ? n - start : RUN;
      if (count > 0) {
        const int slot = EACH > 0 ? start / (64 / V) / (EACH > 0 ? EACH : 1) : 0, e = EACH > 0 ? which[1 + slot] : 0;
        const int within = start / (64 / V) - slot * EACH, block = e * EACH + within, at = start + (e - slot) * EACH * (64 / V);
        const int maximum = e * ((EACH + 255) / 256) + within / 256;
        const float f = EXPAND ? NF4_FACTOR(scales[scale_codes[block]], scale_absmax[maximum], offset[e]) : factor[block];
        LANES for (int i = 0; i < count; ++i) {
          const uint word = codes[at + i];
          UNROLL for (int v = 0; v < V; ++v) ST(T, out, (start + i) * V + v, value[NF4_CODE(word, v)] * f);
        }
      }
    }
  } else {  // a run is one word; everything is under way before the first is needed
    const int lane = lid % SIMD_W;
    uint word[UNITS], code[UNITS];
    float maximum[UNITS], base[UNITS];
    REGS for (int unit = 0; unit < UNITS; ++unit) {
      const int start = (group * UNITS + unit) * THREADS + lid, inside = start < n ? start : n - 1;
      const int slot = EACH > 0 ? inside / (64 / V) / (EACH > 0 ? EACH : 1) : 0, e = EACH > 0 ? which[1 + slot] : 0;
      const int within = inside / (64 / V) - slot * EACH, block = e * EACH + within;
      word[unit] = codes[inside + (e - slot) * EACH * (64 / V)];
      if (EXPAND) {
        code[unit] = scale_codes[block];
        maximum[unit] = scale_absmax[e * ((EACH + 255) / 256) + within / 256];
        base[unit] = offset[e];
      } else {
        base[unit] = factor[block];
      }
    }
    REGS for (int unit = 0; unit < UNITS; ++unit) {
      const int start = (group * UNITS + unit) * THREADS + lid;
      const float f = EXPAND ? NF4_FACTOR(scales[code[unit]], maximum[unit], base[unit]) : base[unit];
      PACK(T, V) made;
      UNROLL for (int v = 0; v < V; ++v) ST(T, made.v, v, value[NF4_CODE(word[unit], v) * SIMD_W + lane] * f);
      if (start < n) ST_PACK(T, V, out, start, made);
    }
  }
