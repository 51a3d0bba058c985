// NF4 back to floats: value[code] * factor of its block of 64, the first of a byte's two codes in the high nibble.
//
// Sizes: codes [ceil(n/2)]; factor [ceil(n/64)]; values [16]; size [1] = n; out [n] of type T.
// A thread makes EPT neighbouring values, block by block, or its part of a block.
  const int n = size[0], begin = thread_position_in_grid.x * EPT, end = begin + EPT < n ? begin + EPT : n;
  const int step = EPT < 64 ? EPT : 64;
  int start = begin;
  for (; start + step <= end; start += step) {
    const float f = factor[start / 64];
    LANES for (int i = 0; i < step / 2; ++i) {
      const uint two = codes[start / 2 + i];
      ST(T, out, start + 2 * i, values[two >> 4] * f);
      ST(T, out, start + 2 * i + 1, values[two & 15u] * f);
    }
  }
  for (; start < end; ++start) {  // the last block, where it is short
    const uint two = codes[start / 2];
    ST(T, out, start, values[start & 1 ? two & 15u : two >> 4] * factor[start / 64]);
  }
