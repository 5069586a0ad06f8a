/* exp and log as straight-line code, so that the compiler may vectorise the loops around them:
 * a lane's operations are the same in a vector register and in a scalar one. */

#define EXP_UNDERFLOW -87.0f
#define EXP_OVERFLOW 88.72283f

/* e^x within 2 ulp; 0 below -87 (so never subnormal), inf above 88.72283.
 * x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series. */
INLINE float exp_f32(float x) {
  const float shift = 0x1.8p23f; /* adding it rounds to an integer, left in the low bits */
  float c = x < EXP_UNDERFLOW ? EXP_UNDERFLOW : x;
  c = c > EXP_OVERFLOW ? EXP_OVERFLOW : c;
  const float shifted = __builtin_fmaf(c, 0x1.715476p+0f, shift);
  const float n = shifted - shift;
  float r = __builtin_fmaf(n, -0x1.62e4p-1f, c);
  r = __builtin_fmaf(n, -0x1.7f7d1cp-20f, r);
  float p = 1.0f / 5040;
  p = __builtin_fmaf(p, r, 1.0f / 720);
  p = __builtin_fmaf(p, r, 1.0f / 120);
  p = __builtin_fmaf(p, r, 1.0f / 24);
  p = __builtin_fmaf(p, r, 1.0f / 6);
  p = __builtin_fmaf(p, r, 0.5f);
  p = __builtin_fmaf(p, r, 1.0f);
  p = __builtin_fmaf(p, r, 1.0f);
  uint32_t exponent, bits;
  memcpy(&exponent, &shifted, sizeof exponent);
  memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23; /* the shift's own bits fall off the top */
  memcpy(&p, &bits, sizeof p);
  p = x < EXP_UNDERFLOW ? 0.0f : p;
  p = x > EXP_OVERFLOW ? INFINITY : p;
  return x != x ? x : p;
}

/* ln x for positive, normal x, to 2e-15 of itself; the very operations of elementary.py's log_f64. */
INLINE double log_f64(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  const int32_t k = (int32_t)((uint32_t)(bits >> 32) - 0x3fe6a09eu) >> 20;
  bits -= (uint64_t)(int64_t)k << 52;
  double m;
  memcpy(&m, &bits, sizeof m);
  const double s = (m - 1.0) / (m + 1.0), z = s * s, s2 = s + s;
  double p = 1.0 / 19;
  p = p * z + 1.0 / 17;
  p = p * z + 1.0 / 15;
  p = p * z + 1.0 / 13;
  p = p * z + 1.0 / 11;
  p = p * z + 1.0 / 9;
  p = p * z + 1.0 / 7;
  p = p * z + 1.0 / 5;
  p = p * z + 1.0 / 3;
  const double low = s2 * (z * p) + (double)k * 0x1.a39ef35793c76p-33;
  return (double)k * 0x1.62e42feep-1 + (s2 + low);
}

/* Sixteen lanes added in halves. */
INLINE float lane_sum(float *lanes) {
  for (int half = 8; half; half >>= 1)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}
