// COUNT of eight arrays in another number format, their rows in another order: o[slot] = a[order[slot]].
//
// Sizes: a0 .. a7, of type S, and o0 .. o7, of type T [E,each]; order [E]. `each` is a multiple of V.
  const int first = thread_position_in_grid.x;
  if (COUNT > 0) MANY_NARROW(a0, a0_shape, o0)
  if (COUNT > 1) MANY_NARROW(a1, a1_shape, o1)
  if (COUNT > 2) MANY_NARROW(a2, a2_shape, o2)
  if (COUNT > 3) MANY_NARROW(a3, a3_shape, o3)
  if (COUNT > 4) MANY_NARROW(a4, a4_shape, o4)
  if (COUNT > 5) MANY_NARROW(a5, a5_shape, o5)
  if (COUNT > 6) MANY_NARROW(a6, a6_shape, o6)
  if (COUNT > 7) MANY_NARROW(a7, a7_shape, o7)
