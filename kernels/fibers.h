// For tests: the GPU's own geometry on the host. Every thread of a threadgroup is a ucontext fiber; a barrier or a shuffle hands
// over to the next one, so after one round every fiber has arrived. It finds wrong indices, shuffles and missing outputs, and
// barriers that not every thread reaches; it cannot find a missing barrier.
#define FIBERS 1
#define threadgroup static thread_local
#define SIMD_W 32
#include <cstdint>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

struct FiberGroup {
  std::vector<ucontext_t> context;
  std::vector<std::vector<char>> stack;
  std::vector<char> done;
  std::vector<int> phase, line;         // shuffles so far; the source line where each fiber waits
  std::vector<uint64_t> slot[2];        // values under exchange, double-buffered so that one round is enough
  std::function<void(int)> body;
  ucontext_t scheduler;
  int current = 0;
};
static thread_local FiberGroup* fiber_group;
static int fiber_diverged = 0;  // the source line of a barrier or shuffle that not every thread reached

static void fiber_entry(unsigned low, unsigned high) {
  FiberGroup* g = (FiberGroup*)(((uint64_t)high << 32) | low);
  g->body(g->current);
  g->done[g->current] = 1;
  swapcontext(&g->context[g->current], &g->scheduler);
}
static void fiber_wait(int line) {
  FiberGroup* g = fiber_group;
  g->line[g->current] = line;
  swapcontext(&g->context[g->current], &g->scheduler);
}
static void fiber_run(int threads, std::function<void(int)> body) {
  FiberGroup g;
  g.body = body;
  g.context.resize(threads);
  g.stack.resize(threads);
  g.done.assign(threads, 0);
  g.phase.assign(threads, 0);
  g.line.assign(threads, 0);
  g.slot[0].assign((threads + 31) & ~31, 0);
  g.slot[1].assign((threads + 31) & ~31, 0);
  fiber_group = &g;
  const uint64_t self = (uint64_t)&g;
  for (int i = 0; i < threads; i++) {
    g.stack[i].resize(256 << 10);
    getcontext(&g.context[i]);
    g.context[i].uc_stack.ss_sp = g.stack[i].data();
    g.context[i].uc_stack.ss_size = g.stack[i].size();
    g.context[i].uc_link = &g.scheduler;
    makecontext(&g.context[i], (void (*)())fiber_entry, 2, (unsigned)self, (unsigned)(self >> 32));
  }
  for (bool waiting = true; waiting && !fiber_diverged;) {
    for (int i = 0; i < threads; i++) {
      g.current = i;
      swapcontext(&g.scheduler, &g.context[i]);
    }
    waiting = !g.done[0];
    for (int i = 1; i < threads; i++)
      if (g.done[i] != g.done[0] || (waiting && g.line[i] != g.line[0])) fiber_diverged = g.line[i] > 0 ? g.line[i] : 1;
  }
  fiber_group = nullptr;
}
template <class V> static V fiber_xor(V v, int offset, int line) {
  FiberGroup* g = fiber_group;
  const int i = g->current, phase = g->phase[i]++ & 1;
  std::memcpy(&g->slot[phase][i], &v, sizeof(V));
  fiber_wait(line);
  V r;
  std::memcpy(&r, &g->slot[phase][i ^ offset], sizeof(V));
  return r;
}
static float fiber_sum(float v, int line) { for (int o = 16; o > 0; o >>= 1) v += fiber_xor(v, o, line); return v; }
static float fiber_max(float v, int line) { for (int o = 16; o > 0; o >>= 1) { const float w = fiber_xor(v, o, line); v = w > v ? w : v; } return v; }
#define TGBARRIER fiber_wait(__LINE__)
#define SIMD_XOR(v, o) fiber_xor(v, o, __LINE__)
#define SIMD_SUM(v) fiber_sum(v, __LINE__)
#define SIMD_MAX(v) fiber_max(v, __LINE__)
