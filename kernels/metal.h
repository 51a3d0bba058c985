// Metal dialect. MLX puts `#include <metal_stdlib>` and its 16-bit types before this.
#define SIMD_W 32
#define LD(p, i) float((p)[i])
#define ST(T, p, i, v) (p)[i] = static_cast<T>(v)
#define ST_HALF_BITS(p, i, bits) (p)[i] = as_type<half>(ushort(bits))
#define LANES
#define LANES_SUM(a)
#define LANES_SUM2(a, b)
#define LANES_MAX(a)
#define REGS _Pragma("clang loop unroll(full)")
#define UNROLL _Pragma("clang loop unroll(full)")
#define ROLLED _Pragma("clang loop unroll(disable)")
#define TGBARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define SIMD_XOR(v, o) metal::simd_shuffle_xor(v, ushort(o))
#define SIMD_SUM(v) metal::simd_sum(v)
#define SIMD_MAX(v) metal::simd_max(v)
#define k_floor metal::floor
#define k_sqrt metal::precise::sqrt
#define k_log metal::precise::log
#define k_fma metal::fma

inline float fexp2(float x) { return metal::fast::exp2(x); }
inline float frcp(float x) { return 1.0f / x; }
inline float k_sqrt_fast(float x) { return metal::fast::sqrt(x); }
template <class T, int N> struct k_pack { T v[N]; };  // of T's own alignment, so it may lie anywhere
#define PACK(T, N) k_pack<T, N>
inline uint k_bits(float v) { return as_type<uint>(v); }
inline uint k_bits(half v) { return as_type<ushort>(v); }
inline uint k_bits(bfloat v) { return as_type<ushort>(v); }
#define LD_PACK(T, N, p, i) ((const device k_pack<T, N>*)(p))[i]
// Words are put together from elements, which may lie anywhere; in `constant` too, where MLX puts arrays of fewer than 8 elements.
#define K_WORDS(space)                                                                                \
  inline uint k_word(const space float* p, size_t i) { return k_bits(p[i]); }                         \
  inline uint k_word(const space ushort* p, size_t i) { return p[2 * i] | uint(p[2 * i + 1]) << 16; } \
  inline uint k_word(const space half* p, size_t i) { return k_word((const space ushort*)p, i); }     \
  inline uint k_word(const space bfloat* p, size_t i) { return k_word((const space ushort*)p, i); }   \
  template <int N, class E> inline k_pack<uint, N> k_words(const space E* p, size_t i) {              \
    k_pack<uint, N> r;                                                                                \
    for (int k = 0; k < N; ++k) r.v[k] = k_word(p, i * N + k);                                        \
    return r;                                                                                         \
  }
K_WORDS(device)
K_WORDS(constant)
#define LD_WORDS(N, p, i) k_words<N>(p, i)
#define ST_PACK(T, N, p, i, value) ((device k_pack<T, N>*)(p))[i] = value
#define PACKABLE(p) true
inline uint k_f2u(float x) { return as_type<uint>(x); }
inline float k_u2f(uint x) { return as_type<float>(x); }
template <class T> inline float k_part(uint w, int i) { return float(as_type<T>(ushort(i ? w >> 16 : w & 0xffffu))); }
template <> inline float k_part<float>(uint w, int) { return as_type<float>(w); }
#define BITS(p, i) k_bits((p)[i])
#define LD_BITS(T, word, i) k_part<T>(word, i)
