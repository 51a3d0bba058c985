// For each token its K likeliest experts, likeliest first, and gates: softmax over all experts, renormalised over the chosen. Then
// the token copies counted by expert, and the order that sorts them by expert: a counting sort, stable, without atomics.
//
// Sizes: logits [M,EXPERTS]; gate, expert, rank [M,K]; order [M*K]; counts [EXPERTS]. rank: how many earlier copies went to the same
// expert. One threadgroup of TH threads makes it all; a thread takes a run of neighbouring tokens, fewer than 65536 / K.
  constexpr int GROUPS = TH / SIMD_W;
  const int M = logits_shape[0], l = thread_index_in_threadgroup, share = (M + TH - 1) / TH;
  const int begin = l * share < M ? l * share : M, end = begin + share < M ? begin + share : M;
  threadgroup ushort count[EXPERTS * TH];        // copies to expert e of thread t, at e * TH + t; then of the threads before it in its group
  threadgroup int group_count[EXPERTS * GROUPS];  // of group g, at e * GROUPS + g; then of the groups before it
  threadgroup int first[EXPERTS];                // of each expert in the order
  for (int e = 0; e < EXPERTS; ++e) count[e * TH + l] = 0;
  for (int row = begin; row < end; ++row) {
    float v[EXPERTS], p[K];
    bool taken[EXPERTS];
    REGS for (int e = 0; e < EXPERTS; ++e) {
      v[e] = LD(logits, row * EXPERTS + e);
      taken[e] = false;
    }
    float largest = 0.0f, total = 0.0f;
    REGS for (int k = 0; k < K; ++k) {
      int best = -1;
      float top = 0.0f;
      REGS for (int e = 0; e < EXPERTS; ++e) {  // of equal logits the first
        const bool better = !taken[e] && (best < 0 || v[e] > top);
        best = better ? e : best;
        top = better ? v[e] : top;
      }
      REGS for (int e = 0; e < EXPERTS; ++e) taken[e] = taken[e] || e == best;
      largest = k == 0 ? top : largest;
      p[k] = k_exp(top - largest);
      total += p[k];
      expert[row * K + k] = best;
      rank[row * K + k] = count[best * TH + l];
      count[best * TH + l] += 1;
    }
    REGS for (int k = 0; k < K; ++k) gate[row * K + k] = p[k] / total;
  }
  TGBARRIER;
  for (int i = l; i < EXPERTS * GROUPS; i += TH) {
    const int start = i / GROUPS * TH + i % GROUPS * SIMD_W;
    int sum = 0;
    for (int t = start; t < start + SIMD_W; ++t) {
      const int here = count[t];
      count[t] = (ushort)sum;
      sum += here;
    }
    group_count[i] = sum;
  }
  TGBARRIER;
  for (int e = l; e < EXPERTS; e += TH) {
    int sum = 0;
    for (int g = e * GROUPS; g < (e + 1) * GROUPS; ++g) {
      const int here = group_count[g];
      group_count[g] = sum;
      sum += here;
    }
    counts[e] = sum;
    first[e] = sum;
  }
  TGBARRIER;
  if (l == 0) {
    int sum = 0;
    for (int e = 0; e < EXPERTS; ++e) {
      const int size = first[e];
      first[e] = sum;
      sum += size;
    }
  }
  TGBARRIER;
  for (int i = begin * K; i < end * K; ++i) {
    const int e = expert[i], place = rank[i] + count[e * TH + l] + group_count[e * GROUPS + l / SIMD_W];
    rank[i] = place;
    order[first[e] + place] = i;
  }
