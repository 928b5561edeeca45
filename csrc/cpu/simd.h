// Vectors, conversions and exp: the only place that knows the instruction set.
//
// One source, compiled once per instruction set by setup.py, which names it in FASTVIT_CAPABILITY. Everything lives in
// a namespace of that name and no function template of the standard library is used: an inline function that two
// objects share would be merged by the linker, and an AVX-512 copy of it could then run on a machine without AVX-512.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../params.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
inline Vec<T> load(const T* source) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(source);
}
template <class T>
inline void store(T* target, Vec<T> value) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(target) = value;
}
// By subtraction of zero, which changes no bit: the compiler makes it one broadcast, and folds that into an FMA.
template <class T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};
}
// The left operand where it is larger, else the right one: a NaN on the left is ignored.
template <class V>
inline V maximum(V left, V right) {
  return left > right ? left : right;
}

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr float kInfinity = __builtin_inff();

// p[i] = p[i] · r[i] + coefficient, for coefficient after coefficient: the vectors take turns, since each waits for its
// own last step, and the processor sees no further ahead than a few of these chains.
template <int N, int Terms>
[[gnu::always_inline]] inline void polynomials(const float (&coefficients)[Terms], const Vec<float> (&r)[N],
                                               Vec<float> (&p)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) p[i] = splat(coefficients[0]);
#pragma GCC unroll 8
  for (int term = 1; term < Terms; ++term) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = p[i] * r[i] + coefficients[term];
  }
}

constexpr float kMagic = 12582912.0f;  // 1.5·2^23: adding it leaves the nearest integer in the low bits

// p · 2^n, where `shifted` is n + kMagic, for x from `least` up; else 0, or the NaN that x is.
[[gnu::always_inline]] inline Vec<float> times_power(Vec<float> p, Vec<float> shifted, Vec<float> x, float least) {
#if defined(__AVX512F__)
  const __mmask16 lanes = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(least), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(lanes, (__m512)p, (__m512)(shifted - kMagic));
#else
  // The sum of bits makes a number of many a NaN.
  const auto bits = (Simd<float>::Int)p + ((Simd<float>::Int)shifted << 23);
  return x >= least ? (Vec<float>)bits : maximum(Vec<float>{}, x);
#endif
}

// exp(x) for x <= 88; exactly 0 below -87.33 (so for -inf), NaN for NaN. Cody-Waite reduction to |r| <= ln2/2, and
// there the polynomial of degree 6 with the least relative error (Remez, 1 + r given): 3.1e-9, a twentieth of an ulp.
template <int N>
[[gnu::always_inline]] inline void exp(Vec<float> (&x)[N]) {
  constexpr float kCoefficients[] = {1.381461275741458e-3f,
                                     8.368710055947304e-3f,
                                     4.166838899254799e-2f,
                                     1.666652113199234e-1f,
                                     4.999999403953552e-1f,
                                     1.0f,
                                     1.0f};
  Vec<float> shifted[N], r[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) shifted[i] = x[i] * 1.44269504088896341f + kMagic;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const Vec<float> n = shifted[i] - kMagic;
#if defined(__FMA__)
    // Not rounded before the subtraction; that ln2 is counts for less than an ulp until the result is 1e-14.
    r[i] = x[i] - n * 0.693147180559945309f;
#else
    r[i] = (x[i] - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
#endif
  }
  polynomials(kCoefficients, r, p);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = times_power(p[i], shifted[i], x[i], -87.33f);
}
// Speed does not matter in double precision; the library's exp does.
template <int N>
inline void exp(Vec<double> (&x)[N]) {
  for (Vec<double>& vector : x) {
    for (int lane = 0; lane < kLanes<double>; ++lane) vector[lane] = ::exp(vector[lane]);
  }
}
template <class V>
inline V exp(V x) {
  V one[] = {x};
  exp(one);
  return one[0];
}

// log(x) for a sum of exponentials of which the largest is 1: x is 0 (then -inf), NaN, or from 1 up. With x = 2^n (1 +
// f), 1 + f between sqrt(1/2) and sqrt(2), log(1 + f) = 2 atanh(s), s = f / (2 + f): the series in s^2 up to s^9, whose
// next term is below a quarter of an ulp.
inline Vec<float> log_of_sum(Vec<float> x) {
  using I = Simd<float>::Int;
  const I bits = (I)x, n = (bits - 0x3f3504f3) >> 23;
  const Vec<float> f = (Vec<float>)(bits - (n << 23)) - 1.0f;
  const Vec<float> s = f / (f + 2.0f), z = s * s;
  Vec<float> p = splat(2.0f / 9);
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  // f - s (f - z p) is 2 s + s z p without the rounding of 2 s.
  const Vec<float> log_of_f = f - s * (f - z * p);
  const Vec<float> count = __builtin_convertvector(n, Vec<float>);
  const Vec<float> result = count * 0.693145751953125f + (count * 1.42860682030941723e-6f + log_of_f);
  return x == 0.0f ? splat(-kInfinity) : x == x ? result : x;
}
inline Vec<double> log_of_sum(Vec<double> x) {
  Vec<double> result;
  for (int lane = 0; lane < kLanes<double>; ++lane) result[lane] = ::log(x[lane]);
  return result;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return float_of_bits(uint32_t(value.bits) << 16); }
inline float widen(Half value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  if (magnitude >= 0x0f800000) return float_of_bits(sign | magnitude | 0x7f800000);  // infinity and NaN
  // 2^112 moves the exponent from half's bias to float's, subnormals included.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude) * 5.192296858534828e33f));
#endif
}

template <class Out>
inline Out narrow(float value);
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  uint32_t bits = bits_of_float(value);
  if (value != value) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline Half narrow<Half>(float value) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits = bits_of_float(value);
  uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds past 65504
  if (bits < 0x38800000) {
    // Subnormal: adding 0.5 puts half's last place at float's last place, rounded to nearest even by the addition.
    return {uint16_t(sign | (bits_of_float(float_of_bits(bits) + 0.5f) - 0x3f000000))};
  }
  return {uint16_t(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13))};
#endif
}

// The type in which an input type is computed.
template <class In>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class In>
using Compute = typename ComputeType<In>::type;

template <class T>
struct Tag {
  using type = T;
};

// Calls f with the tag of the input type.
template <class F>
inline void dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Tag<Half>{});
    case DType::kBFloat16:
      return f(Tag<BFloat16>{});
    case DType::kFloat32:
      return f(Tag<float>{});
    case DType::kFloat64:
      return f(Tag<double>{});
  }
}

// target[i] = factor · source[i], widened.
template <class In>
inline void load_row(const In* source, int64_t count, Compute<In> factor, Compute<In>* target) {
  int64_t i = 0;
  if constexpr (sizeof(In) == 2) {
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) {
      __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
      __m512 wide;
      if constexpr (__is_same(In, Half)) {
        wide = _mm512_cvtph_ps(packed);
      } else {
        wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
      }
      _mm512_storeu_ps(target + i, _mm512_mul_ps(wide, _mm512_set1_ps(factor)));
    }
#elif defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
      __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
      __m256 wide;
      if constexpr (__is_same(In, Half)) {
        wide = _mm256_cvtph_ps(packed);
      } else {
        wide = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
      }
      _mm256_storeu_ps(target + i, _mm256_mul_ps(wide, _mm256_set1_ps(factor)));
    }
#endif
  }
  for (; i < count; ++i) target[i] = factor * widen(source[i]);
}

#if defined(__AVX512F__)
// Lanes [0, count) of a vector of 32 or 16.
inline __mmask32 first_lanes(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }
#elif defined(__AVX2__)
// All bits set in lanes [0, count).
inline __m256i first_lanes_mask(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(min64(count, 8))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first `count` elements, widened, and zero in the other lanes; memory beyond them is not read.
template <class In>
inline Vec<Compute<In>> load_first(const In* source, int64_t count) {
  using T = Compute<In>;
#if defined(__AVX512F__)
  if constexpr (!__is_same(In, double)) {
    const __mmask16 mask = __mmask16(first_lanes(count));
    if constexpr (__is_same(In, float)) {
      return (Vec<T>)_mm512_maskz_loadu_ps(mask, source);
    } else {
      const __m256i packed = _mm256_maskz_loadu_epi16(mask, source);
      if constexpr (__is_same(In, Half)) return (Vec<T>)_mm512_maskz_cvtph_ps(mask, packed);
      return (Vec<T>)_mm512_maskz_slli_epi32(mask, _mm512_maskz_cvtepu16_epi32(mask, packed), 16);
    }
  }
#endif
  if constexpr (__is_same(In, T)) {
    if (count >= kLanes<T>) return load(source);
  }
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (__is_same(In, float)) return (Vec<T>)_mm256_maskload_ps(source, first_lanes_mask(count));
#endif
  T lanes[kLanes<T>] = {};
  load_row(source, min64(count, kLanes<T>), T(1), lanes);
  return load(lanes);
}

#if defined(__AVX512F__)
// 16 elements of 16 bits, rounded to nearest even.
template <class Out>
inline __m256i narrow_lanes(__m512 wide) {
  if constexpr (__is_same(Out, Half)) {
    return _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const __m512i bits = _mm512_castps_si512(wide);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
}
#endif

// target[i] = source[i], rounded to nearest even.
template <class Out>
inline void store_row(const Compute<Out>* source, int64_t count, Out* target) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Out) == 2) {
    for (; i + 16 <= count; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), narrow_lanes<Out>(_mm512_loadu_ps(source + i)));
    }
  }
#endif
  for (; i < count; ++i) {
    if constexpr (__is_same(Out, double)) {
      target[i] = source[i];
    } else {
      target[i] = narrow<Out>(source[i]);
    }
  }
}

// The first `count` lanes, rounded to nearest even; memory beyond them is not written. Past the caches if `streamed`,
// which takes a whole line.
template <class Out>
inline void store_first(Vec<Compute<Out>> value, int64_t count, Out* target, [[maybe_unused]] bool streamed = false) {
  using T = Compute<Out>;
#if defined(__AVX512F__)
  if constexpr (!__is_same(Out, double)) {
    const __mmask16 mask = __mmask16(first_lanes(count));
    if constexpr (__is_same(Out, float)) {
      if (streamed) return _mm512_stream_ps(target, (__m512)value);
      return _mm512_mask_storeu_ps(target, mask, (__m512)value);
    } else {
      return _mm256_mask_storeu_epi16(target, mask, narrow_lanes<Out>((__m512)value));
    }
  }
#endif
  if constexpr (__is_same(Out, T)) {
    if (count >= kLanes<T>) return store(target, value);
  }
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (__is_same(Out, float)) {
    return _mm256_maskstore_ps(target, first_lanes_mask(count), (__m256)value);
  }
#endif
  T lanes[kLanes<T>];
  store(lanes, value);
  store_row(lanes, min64(count, kLanes<T>), target);
}

// One exchange of the butterfly transpose: blocks of `Step` lanes are swapped across the diagonal of (low, high).
template <class T, int Step>
[[gnu::always_inline]] inline void exchange(Vec<T>& low, Vec<T>& high) {
  using I = typename Simd<T>::Int;
  I first, second;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    first[lane] = lane & Step ? kLanes<T> + lane - Step : lane;
    second[lane] = lane & Step ? kLanes<T> + lane : lane + Step;
  }
  Vec<T> upper = __builtin_shuffle(low, high, first);
  high = __builtin_shuffle(low, high, second);
  low = upper;
}

// Inlined, always: its rows live in registers.
template <class T, int Step>
[[gnu::always_inline]] inline void transpose_step(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (Step < kLanes<T>) {
#pragma GCC unroll 16
    for (int row = 0; row < kLanes<T>; ++row) {
      if (!(row & Step)) exchange<T, Step>(rows[row], rows[row + Step]);
    }
    transpose_step<T, Step * 2>(rows);
  }
}

// Leaves the sum of the lanes of rows[i] in lane i of rows[0].
template <class T, int Step>
[[gnu::always_inline]] inline void sum_lanes_step(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (Step < kLanes<T>) {
#pragma GCC unroll 8
    for (int row = 0; row < kLanes<T>; row += 2 * Step) {
      exchange<T, Step>(rows[row], rows[row + Step]);
      rows[row] += rows[row + Step];
    }
    sum_lanes_step<T, Step * 2>(rows);
  }
}

// target[c][r] = source[r][c]; rows and columns are multiples of the vector length.
template <class T>
inline void transpose(const T* source, int64_t source_stride, int64_t rows, int64_t columns, T* target,
                      int64_t target_stride) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += L) {
    for (int64_t c = 0; c < columns; c += L) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = load(source + (r + i) * source_stride + c);
      transpose_step<T, 1>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(target + (c + i) * target_stride + r, block[i]);
    }
  }
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
