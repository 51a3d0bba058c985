// Gradient of looking rows up: out[v] = before[v] plus the rows of y whose index is v, in float32 and in their order; no atomics.
//
// Sizes: before, out of type T [V,R]; y [M,R]; sorted [M], the indices in rising order; order [M], which row of y each belongs to.
// A thread makes CPT neighbouring elements of a row.
  const int V = before_shape[0], R = before_shape[1], M = sorted_shape[0], v = thread_position_in_grid.y;
  const int begin = thread_position_in_grid.x * CPT, end = begin + CPT < R ? begin + CPT : R;
  int low = 0, high = M;
  while (low < high) {  // the first place whose index is not below v
    const int middle = (low + high) / 2;
    if (sorted[middle] < v) { low = middle + 1; } else { high = middle; }
  }
  if (v < V) {
    LANES for (int r = begin; r < end; ++r) {
      float sum = LD(before, (size_t)v * R + r);
      for (int i = low; i < M && sorted[i] == v; ++i) sum += LD(y, (size_t)order[i] * R + r);
      ST(T, out, (size_t)v * R + r, sum);
    }
  }
