// NF4: 64 values become the largest magnitude among them and 64 codes of 4 bits, the first of two in the high nibble.
// A code is the number of borders that lie below value / largest: the nearest of the 16 values.
//
// Sizes: w [n]; borders [15]; codes [ceil(n/2)]; absmax [ceil(n/64)]. The last block may be short, the last byte half used.
// A simdgroup makes BLOCKS blocks. Host results equal bitsandbytes' to the bit, so nothing here may be contracted or reordered.
  const int n = w_shape[0], blocks = (n + 63) / 64, lane = SIMD_W == 1 ? 0 : thread_position_in_grid.x % SIMD_W;
  const int begin = thread_position_in_grid.x / SIMD_W * BLOCKS;
  for (int block = begin; block < begin + BLOCKS; ++block) {
    const int start = block * 64, left = n - start, count = left < 64 ? (left > 0 ? left : 0) : 64;
    float largest = 0.0f;
    LANES_MAX(largest) for (int i = lane; i < count; i += SIMD_W) {
      const float v = LD(w, start + i), size = v < 0.0f ? -v : v;
      largest = size > largest ? size : largest;
    }
    largest = SIMD_MAX(largest);
    if (block < blocks && lane == 0) absmax[block] = largest;
    const float inverse = 1.0f / (largest > 1e-38f ? largest : 1e-38f);
    LANES for (int i = lane; i < (count + 1) / 2; i += SIMD_W) {
      const int there = 2 * i + 1 < count ? 1 : 0;
      const float a = LD(w, start + 2 * i) * inverse, b = there * LD(w, start + 2 * i + there) * inverse;
      int high = 0, low = 0;
      UNROLL for (int k = 0; k < 15; ++k) { high += a > borders[k] ? 1 : 0; low += b > borders[k] ? 1 : 0; }
      codes[start / 2 + i] = (uint8_t)((high << 4) | low);
    }
  }
