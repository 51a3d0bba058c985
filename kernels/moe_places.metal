// Where each token copy lies while experts work: expert e's copies, in order, from row START(e) on, where START(e) is e * CAPACITY if
// rows are padded (CAPACITY > 0) and the number of copies of the experts before it if not. Padding gets -1.
//
// Sizes: expert, rank [M,K]; order [S], S = M*K; counts [EXPERTS]; copy, token [N] for each row; place [S], the row of each copy.
// Thread i makes row i and copy i.
  const int S = order_shape[0], N = CAPACITY > 0 ? EXPERTS * CAPACITY : S, i = thread_position_in_grid.x;
  const int e = i / (CAPACITY > 0 ? CAPACITY : 1), slot = i - e * CAPACITY, mine = expert[i < S ? i : 0];
  int before_row = 0, before_copy = 0;
  for (int k = 0; k < EXPERTS; ++k) {
    before_row += k < e ? counts[k] : 0;
    before_copy += k < mine ? counts[k] : 0;
  }
  if (i < N) {
    const bool filled = CAPACITY == 0 || slot < counts[e < EXPERTS ? e : 0];
    const int from = filled ? order[CAPACITY > 0 ? before_row + slot : i] : -1;
    copy[i] = from;
    token[i] = from < 0 ? -1 : from / K;
  }
  // A copy beyond the capacity gets a place that is there: what is computed then will not be used.
  if (i < S) place[i] = CAPACITY > 0 ? mine * CAPACITY + (rank[i] < CAPACITY ? rank[i] : CAPACITY - 1) : before_copy + rank[i];
