// CUDA dialect, seen by nvcc or NVRTC after CUDA's 16-bit headers or MLX's own includes, at global scope; NVRTC has no host headers.
// Never `#define device` here: nvcc's __device__ is __location__(device), and an empty macro silently un-devices it.
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef __half half;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat;
typedef __nv_bfloat16 bfloat16_t;

#define threadgroup __shared__
#define SIMD_W 32
#define LD(p, i) float((p)[i])
#define ST(T, p, i, v) (p)[i] = static_cast<T>(v)
#define ST_HALF_BITS(p, i, bits) (p)[i] = __ushort_as_half(static_cast<ushort>(bits))
#define LANES
#define LANES_SUM(a)
#define LANES_SUM2(a, b)
#define LANES_MAX(a)
#define REGS _Pragma("unroll")
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define TGBARRIER __syncthreads()
#define SIMD_XOR(v, o) __shfl_xor_sync(0xffffffffu, v, o)
#define SIMD_SUM(v) k_simd_sum(v)
#define SIMD_MAX(v) k_simd_max(v)
#define k_floor floorf
#define k_sqrt sqrtf
#define k_log logf
#define k_fma fmaf

// Metal's thread attributes.
struct k_uint3 { unsigned x, y, z; };
__device__ __forceinline__ k_uint3 k_u3(unsigned x, unsigned y, unsigned z) { k_uint3 r; r.x = x; r.y = y; r.z = z; return r; }
#define thread_position_in_grid k_u3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, blockIdx.z * blockDim.z + threadIdx.z)
#define thread_position_in_threadgroup k_u3(threadIdx.x, threadIdx.y, threadIdx.z)
#define threadgroup_position_in_grid k_u3(blockIdx.x, blockIdx.y, blockIdx.z)
#define threads_per_threadgroup k_u3(blockDim.x, blockDim.y, blockDim.z)
#define threadgroups_per_grid k_u3(gridDim.x, gridDim.y, gridDim.z)
#define thread_index_in_threadgroup ((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x)
#define thread_index_in_simdgroup (thread_index_in_threadgroup & 31u)
#define simdgroup_index_in_threadgroup (thread_index_in_threadgroup >> 5)

__device__ __forceinline__ float k_simd_sum(float v) { for (int o = 16; o > 0; o >>= 1) v += SIMD_XOR(v, o); return v; }
__device__ __forceinline__ float k_simd_max(float v) { for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, SIMD_XOR(v, o)); return v; }
__device__ __forceinline__ float fexp2(float x) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
__device__ __forceinline__ float frcp(float x) { float r; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
__device__ __forceinline__ unsigned k_f2u(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float k_u2f(unsigned x) { return __uint_as_float(x); }
__device__ __forceinline__ float k_sqrt_fast(float x) { float r; asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
// Aligned to its size where that is a power of two up to 16, else to that size's largest such factor.
#define K_FACTOR(bytes) (((bytes) & (~(bytes) + 1)) < 16 ? (bytes) & (~(bytes) + 1) : 16)
template <class T, int N> struct alignas(K_FACTOR(sizeof(T) * N)) k_pack { T v[N]; };
#define PACK(T, N) k_pack<T, N>
#define LD_PACK(T, N, p, i) reinterpret_cast<const k_pack<T, N>*>(p)[i]
#define LD_WORDS(N, p, i) LD_PACK(uint, N, p, i)
#define ST_PACK(T, N, p, i, value) reinterpret_cast<k_pack<T, N>*>(p)[i] = value
#define PACKABLE(p) ((reinterpret_cast<size_t>(p) & 15) == 0)
__device__ __forceinline__ unsigned k_bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ unsigned k_bits(__half v) { return __half_as_ushort(v); }
__device__ __forceinline__ unsigned k_bits(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
template <class T> struct k_part {};
template <> struct k_part<float> { static __device__ __forceinline__ float of(unsigned w, int) { return __uint_as_float(w); } };
template <> struct k_part<__half> {
  static __device__ __forceinline__ float of(unsigned w, int i) { return __half2float(__ushort_as_half(ushort(i ? w >> 16 : w & 0xffffu))); }
};
template <> struct k_part<__nv_bfloat16> {
  static __device__ __forceinline__ float of(unsigned w, int i) { return __uint_as_float(i ? w & 0xffff0000u : w << 16); }
};
#define BITS(p, i) k_bits((p)[i])
#define LD_BITS(T, word, i) k_part<T>::of(word, i)
#define inline __device__ __forceinline__  // for the functions of common.h and of a kernel's own header, which follow
