// For the NF4 texts. The factor of a block, with product and sum rounded apart, as bitsandbytes does; nvcc would fuse them.
#ifdef __CUDACC__
#define NF4_FACTOR(value, scale, offset) __fadd_rn(__fmul_rn(value, scale), offset)
#else
#define NF4_FACTOR(value, scale, offset) ((value) * (scale) + (offset))
#endif
// Code number v of a word: the first of a byte's two is in the high nibble, the first byte is the lowest.
#define NF4_CODE(word, v) ((uint)((word) >> ((v) / 2 * 8 + ((v) & 1 ? 0 : 4))) & 15u)
// Where the value of code number v stands in a table that holds each value for every lane, value[16 * SIMD_W]. On a GPU the code is
// shifted to where the byte address wants it, one instruction less than by its number.
#define NF4_SHIFT(v) ((v) / 2 * 8 + ((v) & 1 ? 0 : 4))
#define NF4_MOVED(word, v) (NF4_SHIFT(v) >= 7 ? (uint)(word) >> (NF4_SHIFT(v) >= 7 ? NF4_SHIFT(v) - 7 : 0) : (uint)(word) << (NF4_SHIFT(v) < 7 ? 7 - NF4_SHIFT(v) : 0))
#define NF4_AT(word, v, lane) (SIMD_W == 32 ? ((NF4_MOVED(word, v) & 0x780u) | (uint)(lane) * 4u) >> 2 : NF4_CODE(word, v))
