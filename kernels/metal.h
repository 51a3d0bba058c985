// Metal dialect. MLX puts `#include <metal_stdlib>` and its 16-bit types before this.
#define SIMD_W 32
#define LD(p, i) float((p)[i])
#define ST(T, p, i, v) (p)[i] = static_cast<T>(v)
#define LANES
#define LANES_SUM(a)
#define LANES_SUM2(a, b)
#define LANES_MAX(a)
#define REGS _Pragma("clang loop unroll(full)")
#define UNROLL _Pragma("clang loop unroll(full)")
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
template <class T, int N, class E> inline k_pack<T, N> k_ld_pack(const device E* p, size_t i) { return ((const device k_pack<T, N>*)p)[i]; }
template <class T, int N, class E> inline k_pack<T, N> k_ld_pack(const constant E* p, size_t i) {  // arrays of fewer than 8 elements
  k_pack<T, N> r;
  for (int k = 0; k < N; ++k) r.v[k] = ((const constant T*)p)[i * N + k];
  return r;
}
#define LD_PACK(T, N, p, i) k_ld_pack<T, N>(p, i)
#define ST_PACK(T, N, p, i, value) ((device k_pack<T, N>*)(p))[i] = value
#define PACKABLE(p) true
inline uint k_f2u(float x) { return as_type<uint>(x); }
inline float k_u2f(uint x) { return as_type<float>(x); }
inline uint k_bits(float v) { return as_type<uint>(v); }
inline uint k_bits(half v) { return as_type<ushort>(v); }
inline uint k_bits(bfloat v) { return as_type<ushort>(v); }
template <class T> inline float k_part(uint w, int i) { return float(as_type<T>(ushort(i ? w >> 16 : w & 0xffffu))); }
template <> inline float k_part<float>(uint w, int) { return as_type<float>(w); }
#define BITS(p, i) k_bits((p)[i])
#define LD_BITS(T, word, i) k_part<T>(word, i)
