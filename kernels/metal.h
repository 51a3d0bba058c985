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
#define LD_PACK(T, N, p, i) ((const device k_pack<T, N>*)(p))[i]
#define ST_PACK(T, N, p, i, value) ((device k_pack<T, N>*)(p))[i] = value
#define PACKABLE(p) true
inline uint k_f2u(float x) { return as_type<uint>(x); }
inline float k_u2f(uint x) { return as_type<float>(x); }
