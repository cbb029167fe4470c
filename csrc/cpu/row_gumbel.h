// Gumbel noise of the tokens of a row. Compiled once per instruction set, as for_each_isa.h says.

inline IntVec lane_numbers() {
  IntVec number = {};
  for (int i = 0; i < kLanes; ++i) number[i] = i;
  return number;
}

// the even lanes of a times b, 64 bits each
typedef uint64_t WideVec __attribute__((vector_size(4 * LEGO_LANES)));
inline WideVec multiply_even(WideVec a, uint32_t b) {
#if LEGO_LANES == 16
  return (WideVec)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif LEGO_LANES == 8
  return (WideVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffff) * b;
#endif
}

// Philox4x32-10, one counter in each lane. Source: Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3".
inline void philox(UintVec counter[4], uint64_t key) {
  const uint32_t multiplier[] = {0xD2511F53, 0xCD9E8D57};
  uint32_t key_low = static_cast<uint32_t>(key), key_high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    UintVec low[2], high[2];
    for (int i = 0; i < 2; ++i) {
      const WideVec pairs = (WideVec)counter[2 * i];
      const WideVec even = multiply_even(pairs, multiplier[i]),
                    odd = multiply_even(pairs >> 32, multiplier[i]);
      low[i] = (UintVec)((even & 0xffffffff) | odd << 32);
      high[i] = (UintVec)(even >> 32 | (odd & 0xffffffff00000000));
    }
    counter[0] = high[1] ^ counter[1] ^ key_low;
    counter[1] = low[1];
    counter[2] = high[0] ^ counter[3] ^ key_high;
    counter[3] = low[0];
    key_low += 0x9E3779B9;
    key_high += 0xBB67AE85;
  }
}

// -log(-log(1 - u)) with u = (x + 1/2) / 2^32. Of u and 1 - u the one below 1/2 is exact to a
// rounding; log(1 - u) from a rounded 1 - u lacks the rounding, which near 0 is its derivative too.
inline Vec gumbel(UintVec x) {
  const IntVec is_low = (IntVec)x >= 0;
  const IntVec nearer = is_low ? (IntVec)x : ~(IntVec)x;
  const Vec part = (__builtin_convertvector(nearer, Vec) + 0.5f) * 0x1p-32f;
  const Vec rounded = where(is_low, 1.0f - part, part);
  const Vec lack = where(is_low, part - (1.0f - rounded), Vec{});
  return -log(lack - log(rounded));
}

// out[i] = x[i] + temperature * noise of token `first` + i, for a tile; first is a multiple of 4
inline void perturb(const float* x, float temperature, uint64_t seed, uint64_t offset, int64_t first,
                    float* out) {
  for (int64_t i = 0; i < lego::kTile; i += 4 * kLanes) {
    const UintVec quad = (UintVec)lane_numbers() + static_cast<uint32_t>((first + i) / 4);
    UintVec words[4] = {quad, UintVec{} + static_cast<uint32_t>(offset),
                        UintVec{} + static_cast<uint32_t>(offset >> 32), UintVec{}};
    philox(words, seed);
    float noise[4][kLanes];
    for (int word = 0; word < 4; ++word) store(noise[word], gumbel(words[word]));
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int word = 0; word < 4; ++word) {
        const int64_t token = i + 4 * lane + word;
        out[token] = x[token] + temperature * noise[word][lane];
      }
    }
  }
}
