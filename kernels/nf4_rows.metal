// Rows of an NF4 matrix by number, with an adapter: y[m] = W[n] + scale B[n] A for n = number[m]. For the embedding of a few tokens.
//
// Sizes: number [M]; codes [O, I / 2]; scale_codes [O I / 64]; scale_absmax, offset, scales, values as in nf4_dequantize; a [RANK,I];
// b [O,RANK]; y [M,I]. I is a multiple of 64. A thread has BYTES neighbouring bytes of codes of one row, all in one block.
  constexpr int I = I_SIZE, BLOCKS = I / 64;
  const int m = thread_position_in_grid.y, first = thread_position_in_grid.x * BYTES, n = number[m];
  if (first < I / 2) {
    const int block = n * BLOCKS + first / 32;
    const float factor = NF4_FACTOR(scales[scale_codes[block]], scale_absmax[block / 256], offset[0]);
    float more[2 * BYTES];
    LANES for (int j = 0; j < 2 * BYTES; ++j) more[j] = 0.0f;
    for (int r = 0; r < RANK; ++r) {
      const float weight = LD(b, (size_t)n * RANK + r);
      LANES for (int j = 0; j < 2 * BYTES; ++j) more[j] += weight * LD(a, (size_t)r * I + 2 * first + j);
    }
    UNROLL for (int j = 0; j < BYTES; ++j) {
      const uint byte = codes[(size_t)n * (I / 2) + first + j];
      UNROLL for (int v = 0; v < 2; ++v) {
        const float plain = values[NF4_CODE(byte, v)] * factor;
        ST(T, y, (size_t)m * I + 2 * (first + j) + v, RANK > 0 ? plain + k_u2f(SCALE_BITS) * more[2 * j + v] : plain);
      }
    }
  }
