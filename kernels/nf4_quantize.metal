// NF4: 64 values become the largest magnitude among them and 64 codes of 4 bits, the first of two in the high nibble.
// A code is the number of borders that lie below value / largest: the nearest of the 16 values.
//
// Sizes: w [n]; borders [15]; codes [ceil(n/2)]; absmax [ceil(n/64)]. The last block may be short, the last byte half used.
// A thread makes BLOCKS blocks. Host results equal bitsandbytes' to the bit, so nothing here may be contracted or reordered.
  const int n = w_shape[0], blocks = (n + 63) / 64;
  const int begin = thread_position_in_grid.x * BLOCKS, end = begin + BLOCKS < blocks ? begin + BLOCKS : blocks;
  for (int block = begin; block < end; ++block) {
    const int start = block * 64, count = n - start < 64 ? n - start : 64;
    float largest = 0.0f;
    LANES_MAX(largest) for (int i = 0; i < count; ++i) {
      const float v = LD(w, start + i), size = v < 0.0f ? -v : v;
      largest = size > largest ? size : largest;
    }
    absmax[block] = largest;
    const float inverse = 1.0f / (largest > 1e-38f ? largest : 1e-38f);
    LANES for (int i = 0; i < (count + 1) / 2; ++i) {
      const int there = 2 * i + 1 < count ? 1 : 0;
      const float a = LD(w, start + 2 * i) * inverse, b = there * LD(w, start + 2 * i + there) * inverse;
      int high = 0, low = 0;
      UNROLL for (int k = 0; k < 15; ++k) { high += a > borders[k] ? 1 : 0; low += b > borders[k] ? 1 : 0; }
      codes[start / 2 + i] = (uint8_t)((high << 4) | low);
    }
  }
