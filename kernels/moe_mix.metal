// The mixture's output for a few rows, as in decoding: out = h + sum_k gate[k] y[k].
//
// Sizes: h, out [M,D]; gate [M,K]; y [M K, D]. A thread has CPT neighbouring columns of one row.
  const int D = D_SIZE, row = thread_position_in_grid.y, first = thread_position_in_grid.x * CPT;
  const int count = D - first < CPT ? D - first : CPT;
  LANES for (int j = 0; j < count; ++j) {
    const size_t at = (size_t)row * D + first + j;
    float all = LD(h, at);
    UNROLL for (int k = 0; k < K; ++k) {
      const float weight = gate[row * K + k], one = LD(y, ((size_t)row * K + k) * D + first + j);
      all += weight * one;
    }
    ST(T, out, at, all);
  }
