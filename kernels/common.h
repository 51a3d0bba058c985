// Shared by all dialects (valid Metal, CUDA and C++). fexp2, frcp and the loop words come from the dialect's own header.
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

inline float k_exp(float x) { return fexp2(x * LOG2E); }

inline float k_sigmoid(float x) { return frcp(1.0f + fexp2(-x * LOG2E)); }

// log(1 + e) for e in [0, 1] by the series of 2 atanh(e / (2 + e)): relative accuracy also for tiny e, where softplus lives.
// Metal has no log1p.
inline float k_log1p01(float e) {
  const float s = e * frcp(2.0f + e), q = s * s;
  float p = 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  p = p * q + 1.0f;
  return 2.0f * s * p;
}

inline float k_softplus(float x) {
  const float positive = x > 0.0f ? x : 0.0f, size = x > 0.0f ? x : -x;
  return positive + k_log1p01(fexp2(-size * LOG2E));
}
