// Vectors of one instruction set, for kernels.cc only: the width follows from the compiler's flags.
//
// GCC's and Clang's vector extension does the arithmetic, so the kernels are written once;
// intrinsics stand where the extension has no word for it. Products followed by sums are contracted
// to fused multiply-adds where the instruction set has them (-ffp-contract=fast).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define ONNXNORM_INLINE inline __attribute__((always_inline))

namespace onnxnorm {
namespace {  // internal linkage: see kernels.h

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

// The lane a kernel computes in, and its constants.
//   magic: adding it rounds to an integer, which then stands in the low bits
//   ln2_hi + ln2_lo = ln 2, such that n * ln2_hi is exact for |n| <= exponent_limit
//   poly: e^r on [-ln2/2, ln2/2], lowest power first
template <class L>
struct Lane;

template <>
struct Lane<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / 4;
  static constexpr int kMantissaBits = 23;
  static constexpr float kBias = 127;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kLog2e = 1.44269504088896341f;
  // 20 bits where a fused product keeps them all, else 9 bits.
  static constexpr float kLn2Hi = kFusedMultiplyAdd ? 0x1.62e43p-1f : 355.0f / 512;
  static constexpr float kLn2Lo =
      static_cast<float>(0.693147180559945309417 - static_cast<double>(kLn2Hi));
  static constexpr float kExponentLimit = kFusedMultiplyAdd ? 1048576 : 32768;
  // Minimax in the relative error, 9.2e-8, from our own Remez fit with the constant term held at 1.
  static constexpr int kTerms = 6;
  static constexpr float kPoly[kTerms] = {1.0f,         0.999999706f,  0.499991477f,
                                          0.166676381f, 0.0418981596f, 0.00829027211f};
};

template <>
struct Lane<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / 8;
  static constexpr int kMantissaBits = 52;
  static constexpr double kBias = 1023;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2Hi = 2977044471.0 / 4294967296.0;  // 32 bits
  static constexpr double kLn2Lo = 1.9082149292705877e-10;
  static constexpr double kExponentLimit = 1048576;
  // Taylor's series; its remainder is below 5e-18 on the interval.
  static constexpr int kTerms = 14;
  static constexpr double kPoly[kTerms] = {1.0,
                                           1.0,
                                           1.0 / 2,
                                           1.0 / 6,
                                           1.0 / 24,
                                           1.0 / 120,
                                           1.0 / 720,
                                           1.0 / 5040,
                                           1.0 / 40320,
                                           1.0 / 362880,
                                           1.0 / 3628800,
                                           1.0 / 39916800,
                                           1.0 / 479001600,
                                           1.0 / 6227020800.0};
};

template <class L>
using Vec = typename Lane<L>::V;

template <class L>
ONNXNORM_INLINE Vec<L> load(const L* p) {
  Vec<L> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class L>
ONNXNORM_INLINE void store(L* p, Vec<L> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class L>
ONNXNORM_INLINE Vec<L> splat(L s) {
  return s - Vec<L>{};
}

#if defined(__AVX512F__)
// The first `count` lanes, at most all of them.
template <class Mask>
ONNXNORM_INLINE Mask first_lanes(ptrdiff_t count) {
  return static_cast<Mask>((1u << count) - 1);
}
#elif defined(__AVX2__)
// The same as a vector, all bits set in those lanes.
template <class L>
ONNXNORM_INLINE typename Lane<L>::I first_lanes(ptrdiff_t count) {
  typedef typename Lane<L>::I I;
  I index;
  for (int i = 0; i < Lane<L>::kWidth; ++i) index[i] = i;
  return (I)(index < (I{} + static_cast<__typeof__(+index[0])>(count)));
}
#endif

// The first `count` lanes from memory, `fill` in the others.
template <class L>
ONNXNORM_INLINE Vec<L> load_some(const L* p, ptrdiff_t count, L fill) {
#if defined(__AVX512F__)
  if constexpr (sizeof(L) == 4)
    return (Vec<L>)_mm512_mask_loadu_ps((__m512)splat<L>(fill), first_lanes<__mmask16>(count), p);
  else
    return (Vec<L>)_mm512_mask_loadu_pd((__m512d)splat<L>(fill), first_lanes<__mmask8>(count), p);
#elif defined(__AVX2__)
  const auto lanes = first_lanes<L>(count);
  if constexpr (sizeof(L) == 4) {
    const __m256 some = _mm256_maskload_ps(p, (__m256i)lanes);
    return (Vec<L>)_mm256_blendv_ps((__m256)splat<L>(fill), some, (__m256)lanes);
  } else {
    const __m256d some = _mm256_maskload_pd(p, (__m256i)lanes);
    return (Vec<L>)_mm256_blendv_pd((__m256d)splat<L>(fill), some, (__m256d)lanes);
  }
#endif
  L buffer[Lane<L>::kWidth];
  for (int i = 0; i < Lane<L>::kWidth; ++i) buffer[i] = i < count ? p[i] : fill;
  return load<L>(buffer);
}

template <class L>
ONNXNORM_INLINE void store_some(L* p, Vec<L> v, ptrdiff_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(L) == 4)
    return _mm512_mask_storeu_ps(p, first_lanes<__mmask16>(count), (__m512)v);
  else
    return _mm512_mask_storeu_pd(p, first_lanes<__mmask8>(count), (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(L) == 4)
    return _mm256_maskstore_ps(p, (__m256i)first_lanes<L>(count), (__m256)v);
  else
    return _mm256_maskstore_pd(p, (__m256i)first_lanes<L>(count), (__m256d)v);
#endif
  L buffer[Lane<L>::kWidth];
  store<L>(buffer, v);
  for (ptrdiff_t i = 0; i < count; ++i) p[i] = buffer[i];
}

// The first `count` lanes, `fill` in the others whatever they hold.
template <class L>
ONNXNORM_INLINE Vec<L> first_or(Vec<L> v, ptrdiff_t count, L fill) {
#if defined(__AVX512F__)
  if constexpr (sizeof(L) == 4) {
    const auto lanes = first_lanes<__mmask16>(count);
    return (Vec<L>)_mm512_mask_mov_ps((__m512)splat<L>(fill), lanes, (__m512)v);
  } else {
    const auto lanes = first_lanes<__mmask8>(count);
    return (Vec<L>)_mm512_mask_mov_pd((__m512d)splat<L>(fill), lanes, (__m512d)v);
  }
#elif defined(__AVX2__)
  const auto lanes = first_lanes<L>(count);
  if constexpr (sizeof(L) == 4)
    return (Vec<L>)_mm256_blendv_ps((__m256)splat<L>(fill), (__m256)v, (__m256)lanes);
  else
    return (Vec<L>)_mm256_blendv_pd((__m256d)splat<L>(fill), (__m256d)v, (__m256d)lanes);
#endif
  for (int i = static_cast<int>(count); i < Lane<L>::kWidth; ++i) v[i] = fill;
  return v;
}

// a > b ? a : b, lane by lane: where either is NaN, the result is b.
template <class V>
ONNXNORM_INLINE V max_or_second(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
  else
    return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm_max_ps((__m128)a, (__m128)b);
  else
    return (V)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}

// a < b ? a : b, lane by lane: where either is NaN, the result is b.
template <class V>
ONNXNORM_INLINE V min_or_second(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm512_min_ps((__m512)a, (__m512)b);
  else
    return (V)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm256_min_ps((__m256)a, (__m256)b);
  else
    return (V)_mm256_min_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm_min_ps((__m128)a, (__m128)b);
  else
    return (V)_mm_min_pd((__m128d)a, (__m128d)b);
#else
  return a < b ? a : b;
#endif
}

template <class V>
ONNXNORM_INLINE V square_root(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4)
    return (V)_mm512_sqrt_ps((__m512)v);
  else
    return (V)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(v[0]) == 4)
    return (V)_mm256_sqrt_ps((__m256)v);
  else
    return (V)_mm256_sqrt_pd((__m256d)v);
#elif defined(__SSE2__)
  if constexpr (sizeof(v[0]) == 4)
    return (V)_mm_sqrt_ps((__m128)v);
  else
    return (V)_mm_sqrt_pd((__m128d)v);
#else
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// Is any lane of a above b?
ONNXNORM_INLINE bool any_above(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(a > b)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)(a > b)) != 0;
#else
  for (int i = 0; i < Lane<float>::kWidth; ++i) {
    if (a[i] > b[i]) return true;
  }
  return false;
#endif
}

ONNXNORM_INLINE bool any_above(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_pd((__m256d)(a > b)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_pd((__m128d)(a > b)) != 0;
#else
  return a[0] > b[0] || a[1] > b[1];
#endif
}

// Is every lane of a at most b? A NaN is not.
template <class V>
ONNXNORM_INLINE bool all_within(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ) == 0;
  else
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NLE_UQ) == 0;
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ)) == 0;
  else
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_NLE_UQ)) == 0;
#elif defined(__SSE2__)
  if constexpr (sizeof(a[0]) == 4)
    return _mm_movemask_ps(_mm_cmpnle_ps((__m128)a, (__m128)b)) == 0;
  else
    return _mm_movemask_pd(_mm_cmpnle_pd((__m128d)a, (__m128d)b)) == 0;
#else
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) {
    if (!(a[i] <= b[i])) return false;
  }
  return true;
#endif
}

// Writes past the caches; `p` is aligned to a vector. `fence` has to follow before others read.
template <class L>
ONNXNORM_INLINE void stream(L* p, Vec<L> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(L) == 4)
    _mm512_stream_ps(p, (__m512)v);
  else
    _mm512_stream_pd(p, (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(L) == 4)
    _mm256_stream_ps(p, (__m256)v);
  else
    _mm256_stream_pd(p, (__m256d)v);
#elif defined(__SSE2__)
  if constexpr (sizeof(L) == 4)
    _mm_stream_ps(p, (__m128)v);
  else
    _mm_stream_pd(p, (__m128d)v);
#else
  store<L>(p, v);
#endif
}

ONNXNORM_INLINE void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The largest lane, of lanes that are no NaN; and the sum of all lanes, by halves.
#if defined(__AVX512F__)
ONNXNORM_INLINE float highest(Vec<float> v) { return _mm512_reduce_max_ps((__m512)v); }
ONNXNORM_INLINE double highest(Vec<double> v) { return _mm512_reduce_max_pd((__m512d)v); }
ONNXNORM_INLINE float total(Vec<float> v) { return _mm512_reduce_add_ps((__m512)v); }
ONNXNORM_INLINE double total(Vec<double> v) { return _mm512_reduce_add_pd((__m512d)v); }
#elif defined(__SSE2__)
typedef float Quad __attribute__((vector_size(16)));
typedef double Couple __attribute__((vector_size(16)));
ONNXNORM_INLINE Quad upper(Quad v) { return (Quad)_mm_movehl_ps((__m128)v, (__m128)v); }
#if defined(__AVX2__)
ONNXNORM_INLINE Quad low_half(Vec<float> v) { return (Quad)_mm256_castps256_ps128((__m256)v); }
ONNXNORM_INLINE Quad high_half(Vec<float> v) { return (Quad)_mm256_extractf128_ps((__m256)v, 1); }
ONNXNORM_INLINE Couple low_half(Vec<double> v) {
  return (Couple)_mm256_castpd256_pd128((__m256d)v);
}
ONNXNORM_INLINE Couple high_half(Vec<double> v) {
  return (Couple)_mm256_extractf128_pd((__m256d)v, 1);
}
#endif
ONNXNORM_INLINE float highest(Vec<float> v) {
#if defined(__AVX2__)
  Quad q = (Quad)_mm_max_ps((__m128)low_half(v), (__m128)high_half(v));
#else
  Quad q = v;
#endif
  q = (Quad)_mm_max_ps((__m128)q, (__m128)upper(q));
  return q[0] > q[1] ? q[0] : q[1];
}
ONNXNORM_INLINE double highest(Vec<double> v) {
#if defined(__AVX2__)
  Couple q = (Couple)_mm_max_pd((__m128d)low_half(v), (__m128d)high_half(v));
#else
  Couple q = v;
#endif
  return q[0] > q[1] ? q[0] : q[1];
}
ONNXNORM_INLINE float total(Vec<float> v) {
#if defined(__AVX2__)
  Quad q = low_half(v) + high_half(v);
#else
  Quad q = v;
#endif
  q += upper(q);
  return q[0] + q[1];
}
ONNXNORM_INLINE double total(Vec<double> v) {
#if defined(__AVX2__)
  Couple q = low_half(v) + high_half(v);
#else
  Couple q = v;
#endif
  return q[0] + q[1];
}
#else
template <class V>
ONNXNORM_INLINE auto highest(V v) {
  auto most = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) most = v[i] > most ? v[i] : most;
  return most;
}
template <class V>
ONNXNORM_INLINE auto total(V v) {
  auto sum = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}
#endif

// -- e^x = m * 2^n, n an integer and m = e^(x - n ln 2) in [2^-1/2, 2^1/2] ------------------------

template <class L>
ONNXNORM_INLINE Vec<L> exponent(Vec<L> x) {
  return (x * Lane<L>::kLog2e + Lane<L>::kMagic) - Lane<L>::kMagic;
}

template <class L>
ONNXNORM_INLINE Vec<L> mantissa(Vec<L> x, Vec<L> n) {
  using T = Lane<L>;
  const Vec<L> r = (x - n * T::kLn2Hi) - n * T::kLn2Lo;
  Vec<L> p = splat<L>(T::kPoly[T::kTerms - 1]);
#pragma GCC unroll 16
  for (int i = T::kTerms - 2; i >= 0; --i) p = p * r + T::kPoly[i];
  return p;
}

// m * 2^n for an integer n that a float's exponent can hold; 0 for n <= -bias, so results below the
// smallest normal number are 0. A NaN in m stays one. Where kScaledDropsAll, that 0 comes whatever
// m is, also for n = -infinity; elsewhere m has to be a number then, and callers bound their
// values.
#if defined(__AVX512F__)
constexpr bool kScaledDropsAll = true;
ONNXNORM_INLINE Vec<float> scaled(Vec<float> m, Vec<float> n) {
  const auto kept = _mm512_cmp_ps_mask((__m512)n, _mm512_set1_ps(-127), _CMP_NLE_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(kept, (__m512)m, (__m512)n);
}
ONNXNORM_INLINE Vec<double> scaled(Vec<double> m, Vec<double> n) {
  const auto kept = _mm512_cmp_pd_mask((__m512d)n, _mm512_set1_pd(-1023), _CMP_NLE_UQ);
  return (Vec<double>)_mm512_maskz_scalef_pd(kept, (__m512d)m, (__m512d)n);
}
#else
constexpr bool kScaledDropsAll = false;
template <class V>
ONNXNORM_INLINE V scaled(V m, V n) {
  using T = Lane<__typeof__(+m[0])>;
  const V bounded = max_or_second(n, V{} - T::kBias);
  const V shifted = bounded + (T::kMagic + T::kBias);
  // Multiplied and never added to the exponent's bits: a NaN has to stay one.
  return m * (V)((typename T::I)shifted << T::kMantissaBits);
}
#endif

// x, or `least` where x is below it; NaN as it is. Nothing where `scaled` makes it needless.
template <class L>
ONNXNORM_INLINE Vec<L> bounded_below(Vec<L> x, L least) {
  return kScaledDropsAll ? x : max_or_second(splat<L>(least), x);
}

// e^x for x <= 0 (and up to about 80): relative error 2e-7 in float, 3e-16 in double; results
// below the smallest normal number are 0. NaN in, NaN out.
template <class L>
ONNXNORM_INLINE Vec<L> exp_nonpositive(Vec<L> x) {
  x = bounded_below<L>(x, -(Lane<L>::kBias + 1) * L(0.6931471805599453));
  const Vec<L> n = exponent<L>(x);
  return scaled(mantissa<L>(x, n), n);
}

// -- storage types --------------------------------------------------------------------------------

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

template <class T>
struct LaneOf {
  using Type = float;
};
template <>
struct LaneOf<double> {
  using Type = double;
};

typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));

ONNXNORM_INLINE Vec<float> widen_f16(Half h) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  const Word word = __builtin_convertvector(h, Word);
  const Word magnitude = (word & 0x7fff) << 13;
  const Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;
  const Word special = magnitude | 0x7f800000u;
  const Word finite = (Word)scaled;
  const Word bits = (Word)((Word)magnitude >= 0x0f800000u ? special : finite);
  return (Vec<float>)(bits | ((word & 0x8000) << 16));
#endif
}

// Rounds to nearest, ties to even.
ONNXNORM_INLINE Half narrow_f16(Vec<float> v) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__) && defined(__F16C__)
  return (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Word word = (Word)v;
  const Word sign = (word & 0x80000000u) >> 16;
  const Word magnitude = word & 0x7fffffffu;
  // Normal: round by adding half a unit, less one where the last bit kept is even.
  const Word normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: the unit in the last place of 0.5 + v is that of a subnormal half.
  const Word small = (Word)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  const Word quiet = (Word)(magnitude > 0x7f800000u ? Word{} + 0x7e00u : Word{} + 0x7c00u);
  Word half = (Word)(magnitude < 0x38800000u ? small : normal);
  half = (Word)(magnitude >= 0x477ff000u ? quiet : half);
  return __builtin_convertvector(half | sign, Half);
#endif
}

ONNXNORM_INLINE Vec<float> widen_bf16(Half h) {
  return (Vec<float>)(__builtin_convertvector(h, Word) << 16);
}

// Rounds to nearest, ties to even.
ONNXNORM_INLINE Half narrow_bf16(Vec<float> v) {
  const Word word = (Word)v;
  const Word rounded = word + 0x7fff + ((word >> 16) & 1);
  const Word is_nan = (Word)((word & 0x7fffffffu) > 0x7f800000u);
  const Word quiet = word | 0x400000u;
  return __builtin_convertvector((is_nan ? quiet : rounded) >> 16, Half);
}

template <class T>
ONNXNORM_INLINE Vec<typename LaneOf<T>::Type> load_as(const T* p) {
  if constexpr (sizeof(T) == 2) {
    Half h;
    __builtin_memcpy(&h, p, sizeof h);
    if constexpr (__is_same(T, F16))
      return widen_f16(h);
    else
      return widen_bf16(h);
  } else {
    return load<T>(p);
  }
}

template <class T>
ONNXNORM_INLINE void store_as(T* p, Vec<typename LaneOf<T>::Type> v) {
  if constexpr (sizeof(T) == 2) {
    Half h;
    if constexpr (__is_same(T, F16))
      h = narrow_f16(v);
    else
      h = narrow_bf16(v);
    __builtin_memcpy(p, &h, sizeof h);
  } else {
    store<T>(p, v);
  }
}

template <class T>
ONNXNORM_INLINE Vec<typename LaneOf<T>::Type> load_some_as(const T* p, ptrdiff_t count,
                                                           typename LaneOf<T>::Type fill) {
  using L = typename LaneOf<T>::Type;
  if constexpr (sizeof(T) > 2) return load_some<L>(p, count, fill);
  T buffer[Lane<L>::kWidth] = {};
  for (ptrdiff_t i = 0; i < count; ++i) buffer[i] = p[i];
  L lanes[Lane<L>::kWidth];
  store<L>(lanes, load_as<T>(buffer));
  return load_some<L>(lanes, count, fill);
}

template <class T>
ONNXNORM_INLINE void store_some_as(T* p, Vec<typename LaneOf<T>::Type> v, ptrdiff_t count) {
  if constexpr (sizeof(T) > 2) return store_some<T>(p, v, count);
  T buffer[Lane<typename LaneOf<T>::Type>::kWidth];
  store_as<T>(buffer, v);
  for (ptrdiff_t i = 0; i < count; ++i) p[i] = buffer[i];
}

template <class T>
ONNXNORM_INLINE typename LaneOf<T>::Type load_one(const void* p, ptrdiff_t index) {
  if constexpr (sizeof(T) > 2) return static_cast<const T*>(p)[index];
  return load_some_as<T>(static_cast<const T*>(p) + index, 1, 0)[0];
}

}  // namespace
}  // namespace onnxnorm
