// float32 vectors of LEGO_LANES lanes. No include guard: for_each_isa.h compiles this once per
// instruction set. All arithmetic is the compiler's own on vector types; the intrinsics are the
// conversions that it would not find.

constexpr int kLanes = LEGO_LANES;
typedef float Vec __attribute__((vector_size(4 * LEGO_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LEGO_LANES)));
typedef uint32_t UintVec __attribute__((vector_size(4 * LEGO_LANES)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * LEGO_LANES)));

inline Vec splat(float x) { return Vec{} + x; }
inline Vec where(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }
// b where either is NaN
inline Vec max(Vec a, Vec b) { return where(a > b, a, b); }
inline Vec min(Vec a, Vec b) { return where(a < b, a, b); }

// one value

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  // a product with a normal result for subnormals, since a thread may flush subnormal operands to 0
  if (rest < 0x400) return bits_to_float(sign | float_to_bits(static_cast<float>(rest) * 0x1p-24f));
  return bits_to_float(sign | ((rest << 13) + (rest < 0x7c00 ? 0x38000000u : 0x70000000u)));
}

// rounds to nearest, ties to even
inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, bf16* to) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? bits >> 16 | 0x40 : rounded);
}
inline void from_float(float x, f16* to) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) {
    half = 0x7e00 | (rest >> 13 & 0x3ff);  // NaN stays NaN, quiet
  } else if (rest >= 0x477ff000) {
    half = 0x7c00;  // from 65,520 on: infinity
  } else if (rest < 0x38800000) {
    // below 2^-14: adding 0.5 lines the last bit of a subnormal up with that of the sum
    half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000;
  } else {
    half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

// kLanes values

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Vec load(const bf16* from) {
  HalfBits bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Vec)(__builtin_convertvector(bits, UintVec) << 16);
}

inline Vec load(const f16* from) {
#if LEGO_LANES == 16
  // the zeroing forms, since GCC 12 takes the plain ones for a use of uninitialised values
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, halves);
#elif LEGO_LANES == 8
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(from[i]);
  return x;
#endif
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

inline void store(bf16* to, Vec x) {
  const UintVec bits = (UintVec)x;
  const UintVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const UintVec kept = (x != x) ? (bits >> 16 | 0x40) : rounded;
  const HalfBits halves = __builtin_convertvector(kept, HalfBits);
  std::memcpy(to, &halves, sizeof halves);
}

inline void store(f16* to, Vec x) {
#if LEGO_LANES == 16
  const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
#elif LEGO_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) from_float(x[i], to + i);
#endif
}

// the first `count` values; the other lanes are zero, and no byte past them is touched
template <class T>
inline Vec load_first(const T* from, int64_t count) {
  T values[kLanes] = {};
#if LEGO_LANES == 16
  // not memcpy, whose call makes the registers around it go to memory
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_storeu_ps(values, _mm512_maskz_loadu_ps(mask, from));
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, from);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), halves);
  }
#else
  std::memcpy(values, from, count * sizeof(T));
#endif
  return load(values);
}

template <class T>
inline void store_first(T* to, Vec x, int64_t count) {
  T values[kLanes];
  store(values, x);
  std::memcpy(to, values, count * sizeof(T));
}

// Calls whole(i) for the whole vectors of `size` values, and rest(i, count) for what is left over.
template <class Whole, class Rest>
inline void for_each_vec(int64_t size, const Whole& whole, const Rest& rest) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) whole(i);
  if (i < size) rest(i, size - i);
}

// adds halves to halves, so that the order is the same wherever it is called
inline float sum(Vec x) {
#if LEGO_LANES == 16
  typedef float Half __attribute__((vector_size(32)));
  const Half eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LEGO_LANES == 8
  const Vec eight = x;
#endif
  typedef float Quarter __attribute__((vector_size(16)));
#if LEGO_LANES == 4
  const Quarter four = x;
#else
  const Quarter four =
      __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#endif
  const Quarter two = four + __builtin_shufflevector(four, four, 2, 3, 2, 3);
  return two[0] + two[1];
}

// out[j] = lanes j and j ^ half of `low` where j has no bit `half`, of `high` where it has
template <int half, size_t... lane>
__attribute__((always_inline)) inline Vec fold(Vec low, Vec high, std::index_sequence<lane...>) {
  const Vec left = __builtin_shufflevector(low, high, ((lane & ~half) + (lane & half ? kLanes : 0))...);
  const Vec right = __builtin_shufflevector(low, high, ((lane | half) + (lane & half ? kLanes : 0))...);
  return left + right;
}

// the sum of each of kLanes vectors, all in one, added in the order of sum()
template <int half = kLanes / 2>
__attribute__((always_inline)) inline Vec sum_each(Vec* x) {
  for (int i = 0; i < half; ++i) x[i] = fold<half>(x[i], x[i + half], std::make_index_sequence<kLanes>());
  if constexpr (half > 1) return sum_each<half / 2>(x);
  return x[0];
}

// lanes that are NaN do not count; -inf if all are
inline float largest(Vec x) {
  float most = -__builtin_inff();
  for (int i = 0; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}
