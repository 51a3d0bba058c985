// Where each token copy lies while experts work: expert e's copies, in order, in rows start[e] up to start[e] + room[e]; rows that are
// left over are padding, with copy and token -1.
//
// Sizes: expert, rank [M,K]; order [S], S = M*K; counts, start, room [EXPERTS or more]; copy, token [N] for each row, N the sum of room;
// place [S], the row of each copy. Thread i makes row i and copy i.
  const int S = order_shape[0], i = thread_position_in_grid.x, mine = expert[i < S ? i : 0];
  int e = -1, before = 0, copies = 0;
  for (int k = 0; k < EXPERTS; ++k) {
    const bool here = i >= start[k] && i < start[k] + room[k];
    e = here ? k : e;
    before = here ? copies : before;
    copies += counts[k];
  }
  if (e >= 0) {
    const int slot = i - start[e], from = slot < counts[e] ? order[before + slot] : -1;
    copy[i] = from;
    token[i] = from < 0 ? -1 : from / K;
  }
  // A copy for which there is no room gets a row that is there: what is computed then will not be used.
  if (i < S) place[i] = start[mine] + (rank[i] < room[mine] ? rank[i] : room[mine] - 1);
