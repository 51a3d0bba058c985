// NF4 back to floats: value[code] * factor of its block of 64. Codes are read V at a time, as one word.
// The factor is given (factor [P]), or with EXPAND made here: scales[scale_codes[block]] * scale_absmax[block / 256] + offset.
//
// Sizes for n words: codes [n]; scale_codes [P]; scale_absmax [ceil(P/256)]; offset [1]; scales [256]; values [16]; size [1] = n;
// out [n V] of type T. P = ceil(n V / 64).
// A threadgroup makes UNITS times THREADS runs of RUN words; a run lies in one block.
  const int n = size[0], lid = thread_index_in_threadgroup, group = threadgroup_position_in_grid.x;
  threadgroup float value[16];
  for (int i = lid; i < 16; i += THREADS) value[i] = values[i];
  TGBARRIER;
  REGS for (int unit = 0; unit < UNITS; ++unit) {
    const int start = ((group * UNITS + unit) * THREADS + lid) * RUN, count = n - start < RUN ? n - start : RUN;
    if (count > 0) {
      const int block = start / (64 / V);
      const float f = EXPAND ? NF4_FACTOR(scales[scale_codes[block]], scale_absmax[block / 256], offset[0]) : factor[block];
      if (SIMD_W == 1) {
        LANES for (int i = 0; i < count; ++i) {
          const uint word = codes[start + i];
          UNROLL for (int v = 0; v < V; ++v) ST(T, out, (start + i) * V + v, value[NF4_CODE(word, v)] * f);
        }
      } else {  // a run is one word
        const uint word = codes[start];
        PACK(T, V) made;
        UNROLL for (int v = 0; v < V; ++v) ST(T, made.v, v, value[NF4_CODE(word, v)] * f);
        ST_PACK(T, V, out, start, made);
      }
    }
  }
