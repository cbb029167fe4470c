// exp and log of float32 vectors, within 2 units in the last place. Included by for_each_isa.h.
// Coefficients: Moshier's Cephes library, expf and logf.

// Results below 2^-126 are 0. exp(-inf) is 0, exp(inf) is inf, exp(NaN) is NaN.
inline Vec exp(Vec x) {
  const float lowest = -87.33654f, highest = 88.72283f;
  const Vec clamped = min(max(x, splat(lowest)), splat(highest));
  // adding 1.5 * 2^23 rounds to an integer n, and leaves n in the low bits
  const Vec shifted = clamped * 1.44269504f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  const Vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec fraction = p * (r * r) + r + 1.0f;
  Vec y = (Vec)((IntVec)fraction + ((IntVec)shifted << 23));
  y = where(x < lowest, Vec{}, y);
  y = where(x > highest, splat(__builtin_inff()), y);
  return where(x != x, x, y);
}

// For positive normal numbers.
inline Vec log(Vec x) {
  const IntVec bits = (IntVec)x;
  // the mantissa in [sqrt(1/2), sqrt(2)), its exponent to match
  const IntVec above = bits - 0x3f3504f3;
  const IntVec exponent = above >> 23;
  const Vec m = (Vec)((above & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const Vec e = __builtin_convertvector(exponent, Vec);
  Vec p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vec square = m * m;
  const Vec small = p * m * square - e * 2.12194440e-4f - square * 0.5f;
  return m + small + e * 0.693359375f;
}
