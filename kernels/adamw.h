// One AdamW step of one element (see magellano/ops/adamw.py), shared by the adamw texts.
#define K_LOAD8(T, eight, p, x)                                     \
  if (PACKABLE(p)) {                                                \
    eight = LD_PACK(T, 8, p, x);                                    \
  } else {                                                          \
    REGS for (int k = 0; k < 8; ++k) eight.v[k] = (p)[(x) * 8 + k]; \
  }

struct AdamW { float w, m, s, peak; };

inline uint k_hash(uint x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// x >= 0 to one of its two float16 neighbours, the upper one with the probability that keeps the mean.
inline float k_round_half(float x, uint random) {
  const float power = k_u2f(k_f2u(x) & 0x7f800000u) * 0.0009765625f;
  const float ulp = power > 5.9604645e-8f ? power : 5.9604645e-8f;
  const float inverse = k_u2f(0x7f000000u - k_f2u(ulp));  // exact: ulp is a power of two
  const float rounded = k_floor(x * inverse + float(random >> 8) * 5.9604645e-8f) * ulp;
  return rounded < 65504.0f ? rounded : 65504.0f;
}

inline float k_saturate(float x) {
  const float low = x > -65504.0f ? x : -65504.0f;
  return low < 65504.0f ? low : 65504.0f;
}

// The random number of an element and a step: a hash of the element that the golden ratio moves on with every step. Over the steps
// of one element such numbers cover [0, 1) far more evenly than independent ones, so that the errors of rounding cancel sooner.
inline uint k_random(uint index, uint salt, uint phase) { return k_hash(index * 0x9e3779b1u + salt) + phase; }

// a, b: 1 - beta1, 1 - beta2; decay: lr times weight decay; c1, c2 correct the bias; peak: AMSGrad's largest s, else 0.
inline AdamW k_adamw(float w, float g, float m, float s, float peak, float lr, float a, float b, float eps, float decay, float c1, float c2) {
  AdamW r;
  r.m = m + a * (g - m);
  r.s = k_sqrt(s * s + b * (g * g - s * s));
  r.peak = peak > r.s ? peak : r.s;
  r.w = w * (1.0f - decay) - lr * (r.m * c1) / (r.peak * c2 + eps);
  return r;
}

// The same with the faster root and division, for 16-bit states.
inline AdamW k_adamw_fast(float w, float g, float m, float s, float peak, float lr, float a, float b, float eps, float decay, float c1, float c2) {
  AdamW r;
  r.m = m + a * (g - m);
  r.s = k_sqrt_fast(s * s + b * (g * g - s * s));
  r.peak = peak > r.s ? peak : r.s;
  r.w = w * (1.0f - decay) - lr * (r.m * c1) * frcp(r.peak * c2 + eps);
  return r;
}
