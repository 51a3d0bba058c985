// COUNT of eight arrays behind each other.
//
// Sizes: a0 .. a7 [n], of type T, n a multiple of V; out, as long as all together.
  const int first = thread_position_in_grid.x;
  int at = 0;
  if (COUNT > 0) MANY_JOIN(a0, a0_shape)
  if (COUNT > 1) MANY_JOIN(a1, a1_shape)
  if (COUNT > 2) MANY_JOIN(a2, a2_shape)
  if (COUNT > 3) MANY_JOIN(a3, a3_shape)
  if (COUNT > 4) MANY_JOIN(a4, a4_shape)
  if (COUNT > 5) MANY_JOIN(a5, a5_shape)
  if (COUNT > 6) MANY_JOIN(a6, a6_shape)
  if (COUNT > 7) MANY_JOIN(a7, a7_shape)
