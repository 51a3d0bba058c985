// For the texts that treat eight arrays in one launch. Each macro is the work on one of them; `first` is the thread's number of
// TOTAL threads, V elements are taken at once.

// o[slot] = a[order[slot]] of type T, for the rows of a [E, each]; a single row keeps its place.
#define MANY_NARROW(a, a_size, o)                                                             \
  {                                                                                           \
    const int each = a_size[1] / V, n = a_size[0] * each;                                     \
    for (int i = first; i < n; i += TOTAL) {                                                  \
      const int slot = i / each, from = (a_size[0] == 1 ? 0 : order[slot]) * each + i - slot * each; \
      const PACK(S, V) pack = LD_PACK(S, V, a, from);                                         \
      PACK(T, V) made;                                                                        \
      REGS for (int v = 0; v < V; ++v) ST(T, made.v, v, LD(pack.v, v));                       \
      ST_PACK(T, V, o, i, made);                                                              \
    }                                                                                         \
  }

// sum += the squares of this thread's share of a [n].
#define MANY_SQUARES(a, a_size)                                                          \
  {                                                                                      \
    for (int i = first; i < a_size[0] / V; i += TOTAL) {                                 \
      const PACK(T, V) pack = LD_PACK(T, V, a, i);                                       \
      REGS for (int v = 0; v < V; ++v) sum += LD(pack.v, v) * LD(pack.v, v);             \
    }                                                                                    \
  }

// out[at, at + n) = a [n]; moves at.
#define MANY_JOIN(a, a_size)                                                             \
  {                                                                                      \
    for (int i = first; i < a_size[0] / V; i += TOTAL) {                                 \
      const PACK(T, V) pack = LD_PACK(T, V, a, i);                                       \
      ST_PACK(T, V, out, at + i, pack);                                                  \
    }                                                                                    \
    at += a_size[0] / V;                                                                 \
  }
