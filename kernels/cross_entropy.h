// p^(1 + a) less p, over a, for p = exp(log_p) and y in place of log_p in the exponent: (exp(log_p + a y) - exp(log_p)) / a. By its
// series where a y is small, so that nothing cancels as a tends to 0, where it is p y.
inline float k_tilt(float log_p, float y, float a) {
  const float x = a * y, p = k_exp(log_p);
  const float series = 1.0f + x / 2.0f * (1.0f + x / 3.0f * (1.0f + x / 4.0f * (1.0f + x / 5.0f * (1.0f + x / 6.0f * (1.0f + x / 7.0f)))));
  return x < 0.5f && x > -0.5f ? p * y * series : (k_exp(log_p + x) - p) / a;
}
