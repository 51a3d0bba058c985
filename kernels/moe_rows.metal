// Weighted sums of rows: out[n] = sum over j of scale[n,j] * src[index[n,j]], in float32; a negative index adds nothing. Sends tokens
// to their experts (J = 1), fetches and mixes the results (J = K), and both the other way round for the gradients.
//
// Sizes: src [R,D]; index, scale [N,J], scale read if SCALED; out [N,D] of type T. A thread makes CPT neighbouring elements of a row.
  const int D = src_shape[1], row = thread_position_in_grid.y;
  const int begin = thread_position_in_grid.x * CPT, end = begin + CPT < D ? begin + CPT : D;
  LANES for (int d = begin; d < end; ++d) {
    float sum = 0.0f;
    for (int j = 0; j < J; ++j) {
      const int from = index[row * J + j];
      const float value = LD(src, (size_t)(from < 0 ? 0 : from) * D + d);
      sum += from < 0 ? 0.0f : (SCALED ? scale[SCALED ? row * J + j : 0] : 1.0f) * value;
    }
    ST(T, out, (size_t)row * D + d, sum);
  }
