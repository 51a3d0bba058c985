// Lets clang parse a Metal text as "C++ for OpenCL", off macOS: real address spaces, threadgroup variables only at kernel scope, no
// implicit 16-bit conversions. Not a Metal compiler, but the nearest front end there is; declarations only.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef short int16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long size_t;
typedef uint uint3 __attribute__((ext_vector_type(3)));
struct bfloat {
  ushort u;
  bfloat() = default;
  explicit bfloat(float);
  operator float() const;
  operator float() const __constant;
};
typedef half float16_t;
typedef bfloat bfloat16_t;
enum class mem_flags { mem_threadgroup, mem_device };
namespace metal {
namespace fast { float exp2(float); float exp(float); float log(float); float sqrt(float); }
namespace precise { float exp2(float); float exp(float); float log(float); float sqrt(float); }
float exp(float); float exp2(float); float log(float); float sqrt(float); float rsqrt(float); float floor(float);
float fma(float, float, float);
template <class T> T simd_shuffle_xor(T, ushort);
template <class T> T simd_sum(T);
template <class T> T simd_max(T);
void threadgroup_barrier(mem_flags);
}  // namespace metal
using namespace metal;
template <class T, class U> T as_type(U);
