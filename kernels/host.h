// Host dialect: C++17. A threadgroup is one thread and a simdgroup is one lane, so barriers and shuffles vanish; speed comes from
// the LANES loops, which the compiler vectorises. With FIBERS defined (tests only) fibers.h supplies the GPU's geometry instead.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#define device
#define constant
#define thread
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
struct uint3 { uint x, y, z; };

#define K_STRING(...) #__VA_ARGS__
#define LANES _Pragma("omp simd")
#define LANES_SUM(a) _Pragma(K_STRING(omp simd reduction(+ : a)))
#define LANES_SUM2(a, b) _Pragma(K_STRING(omp simd reduction(+ : a, b)))
#define LANES_MAX(a) _Pragma(K_STRING(omp simd reduction(max : a)))
#define REGS
#define ROLLED
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL
#endif
#ifndef FIBERS
#define threadgroup
#define TGBARRIER
#define SIMD_W 1
#define SIMD_XOR(v, o) (v)
#define SIMD_SUM(v) (v)
#define SIMD_MAX(v) (v)
#endif
#define k_floor __builtin_floorf
#define k_sqrt __builtin_sqrtf
#define k_log __builtin_logf
#define k_fma __builtin_fmaf

static inline uint k_f2u(float x) { uint u; std::memcpy(&u, &x, 4); return u; }
static inline float k_u2f(uint x) { float f; std::memcpy(&f, &x, 4); return f; }

// 16-bit floats are plain integer storage with free functions: class temporaries inside a LANES loop, and gcc 12's _Float16
// conversions, both stop the vectoriser. Rounding is to nearest even; NaN stays NaN.
struct half { uint16_t u; };
struct bfloat { uint16_t u; };
typedef half float16_t;
typedef bfloat bfloat16_t;
static inline float k_ld(const half* p, size_t i) {
  const uint u = p[i].u, e = (u & 0x7fffu) << 13;
  const float f = k_u2f(e) * 5.192296858534828e33f;  // 2^112 moves the exponent's bias; it also scales subnormals
  return k_u2f(((u & 0x7c00u) == 0x7c00u ? (e | 0x7f800000u) : k_f2u(f)) | ((u & 0x8000u) << 16));
}
static inline void k_st(half* p, size_t i, float v) {
  const uint x = k_f2u(v) & 0x7fffffffu, sign = (k_f2u(v) >> 16) & 0x8000u;
  const uint subnormal = k_f2u(k_u2f(x) + 0.5f) - 0x3f000000u, normal = (x + 0xc8000fffu + ((x >> 13) & 1u)) >> 13;
  const uint huge = x > 0x7f800000u ? 0x7e00u : 0x7c00u;
  p[i].u = (uint16_t)(sign | (x >= 0x47800000u ? huge : (x < 0x38800000u ? subnormal : normal)));
}
static inline float k_ld(const bfloat* p, size_t i) { return k_u2f((uint)p[i].u << 16); }
static inline void k_st(bfloat* p, size_t i, float v) {
  const uint x = k_f2u(v), rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
  p[i].u = (uint16_t)((x & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
template <class V> static inline float k_ld(const V* p, size_t i) { return (float)p[i]; }
template <class V> static inline void k_st(V* p, size_t i, float v) { p[i] = (V)v; }
#define LD(p, i) k_ld(p, i)
#define ST(T, p, i, v) k_st(p, i, v)
#define ST_HALF_BITS(p, i, bits) (p)[i].u = (uint16_t)(bits)

// 2^x to 2e-7 relative; below 2^-126 it stays at 2^-126.
static inline float fexp2(float x) {
  x = x < -126.0f ? -126.0f : x;
  x = x > 127.0f ? 127.0f : x;
  const float whole = __builtin_rintf(x), f = x - whole;
  float p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * k_u2f((uint)((int)whole + 127) << 23);
}
static inline float frcp(float x) { return 1.0f / x; }
#define k_sqrt_fast k_sqrt
template <class T, int N> struct k_pack { T v[N]; };
#define PACK(T, N) k_pack<T, N>
#define LD_PACK(T, N, p, i) ((const k_pack<T, N>*)(p))[i]
#define LD_WORDS(N, p, i) LD_PACK(uint, N, p, i)
#define ST_PACK(T, N, p, i, value) ((k_pack<T, N>*)(p))[i] = value
#define PACKABLE(p) true
static inline uint k_bits(float v) { return k_f2u(v); }
static inline uint k_bits(half v) { return v.u; }
static inline uint k_bits(bfloat v) { return v.u; }
template <class T> static inline float k_part(uint w, int i) { const T v = {(uint16_t)(i ? w >> 16 : w)}; return k_ld(&v, 0); }
template <> inline float k_part<float>(uint w, int) { return k_u2f(w); }
#define BITS(p, i) k_bits((p)[i])
#define LD_BITS(T, word, i) k_part<T>(word, i)
