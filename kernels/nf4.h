// For the NF4 texts. The factor of a block, with product and sum rounded apart, as bitsandbytes does; nvcc would fuse them.
#ifdef __CUDACC__
#define NF4_FACTOR(value, scale, offset) __fadd_rn(__fmul_rn(value, scale), offset)
#else
#define NF4_FACTOR(value, scale, offset) ((value) * (scale) + (offset))
#endif
// Code number v of a word: the first of a byte's two is in the high nibble, the first byte is the lowest.
#define NF4_CODE(word, v) ((uint)((word) >> ((v) / 2 * 8 + ((v) & 1 ? 0 : 4))) & 15u)
