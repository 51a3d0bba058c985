// For each token its K likeliest experts, likeliest first, and gates: softmax over all experts, renormalised over the chosen. Then
// the token copies counted by expert, and the order that sorts them by expert: a counting sort, stable, without atomics.
//
// Sizes: logits [M,EXPERTS]; gate, expert, rank [M,K]; order [M*K]; counts [EXPERTS]. rank: how many earlier copies went to the same
// expert. One threadgroup of TH threads makes it all; a thread takes a run of neighbouring tokens.
  const int M = logits_shape[0], l = thread_index_in_threadgroup, share = (M + TH - 1) / TH;
  const int begin = l * share < M ? l * share : M, end = begin + share < M ? begin + share : M;
  threadgroup int count[EXPERTS * TH];  // of expert e in thread t: at e * TH + t
  threadgroup int first[EXPERTS];       // of each expert in the order
  for (int e = 0; e < EXPERTS; ++e) count[e * TH + l] = 0;
  for (int row = begin; row < end; ++row) {
    float largest = 0.0f, total = 0.0f;
    for (int k = 0; k < K; ++k) {
      int best = -1;
      float top = 0.0f;
      for (int e = 0; e < EXPERTS; ++e) {  // of equal logits the first
        bool taken = false;
        for (int j = 0; j < k; ++j) taken = taken || expert[row * K + j] == e;
        const float v = LD(logits, row * EXPERTS + e);
        if (!taken && (best < 0 || v > top)) {
          best = e;
          top = v;
        }
      }
      largest = k == 0 ? top : largest;
      const float p = k_exp(top - largest);
      total += p;
      gate[row * K + k] = p;
      expert[row * K + k] = best;
      rank[row * K + k] = count[best * TH + l];
      count[best * TH + l] += 1;
    }
    for (int k = 0; k < K; ++k) gate[row * K + k] = gate[row * K + k] / total;
  }
  TGBARRIER;
  for (int e = l; e < EXPERTS; e += TH) {
    int sum = 0;
    for (int t = 0; t < TH; ++t) {
      const int here = count[e * TH + t];
      count[e * TH + t] = sum;
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
    const int e = expert[i], place = rank[i] + count[e * TH + l];
    rank[i] = place;
    order[first[e] + place] = i;
  }
