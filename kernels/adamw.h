// One AdamW step of one element (see magellano/ops/adamw.py), shared by the adamw texts.
//
// What a text needs of the inputs now, own and factor (also there), read in wide loads; `scale`: what the states are held times.
// The states' scale cancels in m / s, so it goes into the gradient's factor and eps once instead of into every element.
#define K_STEP(scale)                                                            \
  const PACK(float, 4) now4 = LD_PACK(float, 4, now, 0);                         \
  const PACK(float, 8) own8 = LD_PACK(float, 8, own, 0);                         \
  const float given = factor[0];                                                 \
  AdamWStep step;                                                                \
  step.keep = 1.0f - now4.v[0] * own8.v[3];                                      \
  step.rate = now4.v[0] * now4.v[1];                                             \
  step.c2 = now4.v[2];                                                           \
  step.a = own8.v[0];                                                            \
  step.b = own8.v[1];                                                            \
  step.eps = own8.v[2] * scale;                                                  \
  step.factor = given * scale;                                                   \
  const bool skip = (k_f2u(given) & 0x7f800000u) == 0x7f800000u; /* not finite */

// keep: 1 - lr * weight decay; rate: lr * c1; c1, c2 correct the bias; a, b: 1 - beta1, 1 - beta2.
struct AdamWStep { float keep, rate, c2, a, b, eps, factor; };
struct AdamW { float w, m, s, peak; };

// x >= 0 as the bits of one of its two float16 neighbours, the upper one with the probability that keeps the mean, without a
// conversion or a division, which are slow: random bits are added below the mantissa that stays, and cut off. What is below 2^-14 has
// the spacing of [2^-14, 2^-13), so it makes a detour there. What is taken off last is the difference of the two formats' exponents.
inline uint k_round_half(float x, uint random) {
  const float low = x < 65504.0f ? x : 65504.0f;
  const bool tiny = low < 6.1035156e-5f;
  return ((k_f2u(low + (tiny ? 6.1035156e-5f : 0.0f)) + (random >> 19)) >> 13) - (tiny ? 0x1c400u : 0x1c000u);
}

inline float k_saturate(float x) {
  const float low = x > -65504.0f ? x : -65504.0f;
  return low < 65504.0f ? low : 65504.0f;
}

// The random number of an element and a step: a hash of the element that the golden ratio moves on with every step. Over the steps
// of one element such numbers cover [0, 1) far more evenly than independent ones, so that the errors of rounding cancel sooner.
inline uint k_random(uint index, uint salt, uint phase) {
  const uint x = index * 0x9e3779b1u + salt;
  return (x ^ (x >> 15)) * 0x846ca68bu + phase;
}

// peak: the largest s so far, with AMSGrad alone.
inline AdamW k_adamw(float w, float g, float m, float s, float peak, bool amsgrad, AdamWStep step) {
  AdamW r;
  const float fresh = g * step.factor, square = s * s;
  r.m = m + step.a * (fresh - m);
  r.s = k_sqrt(square + step.b * (fresh * fresh - square));
  r.peak = amsgrad && peak > r.s ? peak : r.s;
  r.w = w * step.keep - step.rate * r.m / (r.peak * step.c2 + step.eps);
  return r;
}

// The same with the faster root and division, for 16-bit states.
inline AdamW k_adamw_fast(float w, float g, float m, float s, float peak, bool amsgrad, AdamWStep step) {
  AdamW r;
  const float fresh = g * step.factor, square = s * s;
  r.m = m + step.a * (fresh - m);
  r.s = k_sqrt_fast(square + step.b * (fresh * fresh - square));
  r.peak = amsgrad && peak > r.s ? peak : r.s;
  r.w = w * step.keep - step.rate * r.m * frcp(r.peak * step.c2 + step.eps);
  return r;
}
