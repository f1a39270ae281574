// The kernels, compiled once for each instruction set: -DONNXNORM_ISA=<name> names the table that
// this translation unit fills. No header with inline functions may be included here (kernels.h).
//
// float16, bfloat16 and float32 are computed in float32, float64 in float64. Sums along a row run
// over at most kSegment values in the lanes of four vectors and go on in float64, and those of a
// norm down columns keep what they lose, so their error does not grow with the length.
#include "kernels.h"

#include "simd.h"

extern "C" double log(double);
extern "C" double sqrt(double);
extern "C" double ldexp(double, int);
extern "C" double frexp(double, int*);

namespace onnxnorm {
namespace {

constexpr int kUnroll = 4;

template <int n>
struct Count {
  static constexpr int value = n;
};

constexpr ptrdiff_t kSegment = 4096;

template <class L>
constexpr L kInfinity = static_cast<L>(__builtin_inf());

// -- values ---------------------------------------------------------------------------------------

// buffer[i] = scale * x[i] + mask[i], n values from `at` on, and zeros up to a whole vector.
template <class T, class L = typename LaneOf<T>::Type>
void stage(const Source& in, ptrdiff_t at, ptrdiff_t n, L* buffer) {
  constexpr int W = Lane<L>::kWidth;
  const T* x = static_cast<const T*>(in.x);
  const T* mask = static_cast<const T*>(in.mask);
  L factor = static_cast<L>(in.scale);
  const T* values = x + at;
  L constant = 0;
  if (mask != nullptr && in.x_step == 1 && in.mask_step == 1) {
    const T* addend = mask + at;
    ptrdiff_t i = 0;
    for (; i + W <= n; i += W) {
      store<L>(buffer + i, load_as<T>(values + i) * factor + load_as<T>(addend + i));
    }
    if (i < n) {
      store<L>(buffer + i, load_some_as<T>(values + i, n - i, 0) * factor +
                               load_some_as<T>(addend + i, n - i, 0));
    }
    return;
  }
  if (mask != nullptr && in.x_step == 0) {
    constant = factor * load_one<T>(x, 0);
    if (in.mask_step == 0) {
      constant += load_one<T>(mask, 0);
      for (ptrdiff_t i = 0; i < n; i += W) store<L>(buffer + i, splat<L>(constant));
      return;
    }
    values = mask + at;
    factor = 1;
  } else if (mask != nullptr) {
    constant = load_one<T>(mask, 0);
  }
  ptrdiff_t i = 0;
  for (; i + W <= n; i += W) {
    store<L>(buffer + i, load_as<T>(values + i) * factor + constant);
  }
  if (i < n) store<L>(buffer + i, load_some_as<T>(values + i, n - i, 0) * factor + constant);
}

template <class T>
bool is_plain(const Source& in) {
  return sizeof(T) > 2 && in.mask == nullptr && in.scale == 1 && in.x_step == 1;
}

// The values, where they stand already or else in `buffer`.
template <class T, class L = typename LaneOf<T>::Type>
const L* fetch(const Source& in, ptrdiff_t at, ptrdiff_t n, L* buffer) {
  if (is_plain<T>(in)) return static_cast<const L*>(in.x) + at;
  stage<T>(in, at, n, buffer);
  return buffer;
}

template <class T, class L = typename LaneOf<T>::Type>
void put(T* y, const L* values, ptrdiff_t n) {
  constexpr int W = Lane<L>::kWidth;
  ptrdiff_t i = 0;
  for (; i + W <= n; i += W) store_as<T>(y + i, load<L>(values + i));
  if (i < n) store_some_as<T>(y + i, load_some<L>(values + i, n - i, 0), n - i);
}

// -- three sweeps, for rows in cache: one exponential an element ----------------------------------

// A row's last values, where they fill no vector. In a buffer with room up to a whole vector
// (`padded`) all of it is read and written: a masked access to what was just written has to wait.
template <class L, bool padded>
ONNXNORM_INLINE Vec<L> load_last(const L* p, ptrdiff_t count, L fill) {
  if constexpr (padded) return first_or<L>(load<L>(p), count, fill);
  return load_some<L>(p, count, fill);
}

// The largest value; NaN are passed over (they make the sum a NaN).
template <class L, bool padded = false>
L max_of(const L* v, ptrdiff_t n, L least) {
  constexpr int W = Lane<L>::kWidth;
  Vec<L> top[kUnroll];
  for (auto& t : top) t = splat<L>(least);
  ptrdiff_t i = 0;
  for (; i + kUnroll * W <= n; i += kUnroll * W) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) top[u] = max_or_second(load<L>(v + i + u * W), top[u]);
  }
  for (; i + W <= n; i += W) top[0] = max_or_second(load<L>(v + i), top[0]);
  if (i < n) top[0] = max_or_second(load_last<L, padded>(v + i, n - i, -kInfinity<L>), top[0]);
  return highest(max_or_second(max_or_second(top[0], top[1]), max_or_second(top[2], top[3])));
}

// e[i] = exp(v[i] - max), and the sum of them. A null e: only the sum. Sums in the lane's type over
// kSegment values, in float64 beyond.
template <class L, bool padded = false>
double exp_sum(const L* v, L* e, ptrdiff_t n, L max) {
  constexpr int W = Lane<L>::kWidth;
  double sum = 0;
  for (ptrdiff_t start = 0; start < n; start += kSegment) {
    const ptrdiff_t stop = n - start < kSegment ? n : start + kSegment;
    Vec<L> sums[kUnroll] = {};
    ptrdiff_t i = start;
    for (; i + kUnroll * W <= stop; i += kUnroll * W) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        const Vec<L> term = exp_nonpositive<L>(load<L>(v + i + u * W) - max);
        if (e != nullptr) store<L>(e + i + u * W, term);
        sums[u] += term;
      }
    }
    for (; i + W <= stop; i += W) {
      const Vec<L> term = exp_nonpositive<L>(load<L>(v + i) - max);
      if (e != nullptr) store<L>(e + i, term);
      sums[0] += term;
    }
    if (i < stop) {
      const Vec<L> last = load_last<L, padded>(v + i, stop - i, -kInfinity<L>);
      const Vec<L> term = exp_nonpositive<L>(last - max);
      if (padded)
        store<L>(e + i, term);
      else if (e != nullptr)
        store_some<L>(e + i, term, stop - i);
      // Where max is -infinity, the lanes that are no values hold NaN too.
      sums[1] += first_or<L>(term, stop - i, 0);
    }
    sum += total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return sum;
}

template <class T, bool padded = false, class L = typename LaneOf<T>::Type>
void scale_into(const L* e, T* y, ptrdiff_t n, L factor) {
  constexpr int W = Lane<L>::kWidth;
  ptrdiff_t i = 0;
  for (; i + kUnroll * W <= n; i += kUnroll * W) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) store_as<T>(y + i + u * W, load<L>(e + i + u * W) * factor);
  }
  for (; i + W <= n; i += W) store_as<T>(y + i, load<L>(e + i) * factor);
  if (i < n) store_some_as<T>(y + i, load_last<L, padded>(e + i, n - i, 0) * factor, n - i);
}

// A row staged in `buffer`, which has room up to a whole vector.
template <class T, class L = typename LaneOf<T>::Type>
ONNXNORM_INLINE void softmax_in_buffer(const Source& in, T* y, ptrdiff_t n, L* buffer) {
  stage<T>(in, 0, n, buffer);
  const L max = max_of<L, true>(buffer, n, -kInfinity<L>);
  const double sum = exp_sum<L, true>(buffer, buffer, n, max);
  scale_into<T, true>(buffer, y, n, static_cast<L>(1 / sum));
}

// -- two sweeps: sums as pairs m * 2^e ------------------------------------------------------------
//
// e^x = m * 2^n without a maximum to subtract, so the sum needs one sweep. Adding pairs means to
// scale both to the larger exponent. Here all lanes of all accumulators share one exponent N, and
// terms m * 2^(n - N) are added as long as no n exceeds it by more than kSlack: only then is N
// moved, and everything scaled, by a power of two and therefore exactly. So the common case costs
// a comparison in place of a rescaling.
//
// Inputs are held to +-kExponentLimit * ln 2, because n must be an exact integer; `is_special` says
// where that could matter, and such rows are done again with the maximum subtracted.

constexpr double kSlack = 60;       // of 127 that a float's exponent allows
constexpr double kNone = -2097152;  // -2^21: the exponent of an empty sum, below every other

template <class L>
constexpr L kBound = static_cast<L>(Lane<L>::kExponentLimit * 0.69314718055994531);

template <class L>
ONNXNORM_INLINE Vec<L> bounded(Vec<L> x) {  // lets NaN through
  return min_or_second(splat<L>(kBound<L>), bounded_below<L>(x, -kBound<L>));
}

template <class L>
bool is_special_pair(const Pair& p) {
  return !(p.m == p.m) || p.top >= Lane<L>::kExponentLimit - 1 ||
         p.top <= 256 - Lane<L>::kExponentLimit;
}

template <class L, int unroll>
ONNXNORM_INLINE void pair_block(const Vec<L>* v, Vec<L>* sums, Vec<L>& top, L& shared, double& m) {
  Vec<L> x[unroll];
  Vec<L> n[unroll];
#pragma GCC unroll 4
  for (int u = 0; u < unroll; ++u) {
    x[u] = bounded<L>(v[u]);
    n[u] = exponent<L>(x[u]);
    top = max_or_second(n[u], top);
  }
  if (__builtin_expect(any_above(top, splat<L>(shared + static_cast<L>(kSlack))), 0)) {
    const L moved = highest(top);
    const double factor = ldexp(1.0, static_cast<int>(shared) - static_cast<int>(moved));
    for (int u = 0; u < kUnroll; ++u) sums[u] *= static_cast<L>(factor);
    m *= factor;
    shared = moved;
  }
#pragma GCC unroll 4
  for (int u = 0; u < unroll; ++u) {
    sums[u] += scaled(mantissa<L>(x[u], n[u]), n[u] - shared);
  }
}

// Adds the exponentials of n <= kSegment values to `sum`.
template <class L>
void pair_sum(const L* v, ptrdiff_t n, Pair& sum) {
  constexpr int W = Lane<L>::kWidth;
  Vec<L> sums[kUnroll] = {};
  Vec<L> top = splat<L>(static_cast<L>(sum.top));
  L shared = static_cast<L>(sum.e);
  ptrdiff_t i = 0;
  for (; i + kUnroll * W <= n; i += kUnroll * W) {
    Vec<L> block[kUnroll];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) block[u] = load<L>(v + i + u * W);
    pair_block<L, kUnroll>(block, sums, top, shared, sum.m);
  }
  for (; i < n; i += W) {
    // Lanes that are no values add nothing: next to a value in [-kBound, kBound] they vanish, and
    // a row that holds no other value is special.
    const Vec<L> one = i + W <= n ? load<L>(v + i) : load_some<L>(v + i, n - i, -kInfinity<L>);
    pair_block<L, 1>(&one, sums, top, shared, sum.m);
  }
  sum.m += total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  sum.e = shared;
  sum.top = highest(top);
}

// y[i] = e^v[i] / sum = m * (1 / M) * 2^(n - N), where M in [1/2, 1).
template <class L>
void pair_finish(const L* v, L* y, ptrdiff_t n, L inverse, L shared, bool past_caches) {
  constexpr int W = Lane<L>::kWidth;
  const auto value = [=](Vec<L> x) __attribute__((always_inline)) {
    x = bounded_below<L>(x, -kBound<L>);  // a row with a value above kBound is special
    const Vec<L> e = exponent<L>(x);
    return scaled(mantissa<L>(x, e) * inverse, e - shared);
  };
  ptrdiff_t i = 0;
  if (past_caches) {
    const ptrdiff_t over = static_cast<ptrdiff_t>(reinterpret_cast<uintptr_t>(y) % kVectorBytes);
    const ptrdiff_t head = over == 0 ? 0 : (kVectorBytes - over) / ptrdiff_t{sizeof(L)};
    if (over % ptrdiff_t{sizeof(L)} == 0 && head <= n) {
      if (head > 0) store_some<L>(y, value(load_some<L>(v, head, 0)), head);
      for (i = head; i + kUnroll * W <= n; i += kUnroll * W) {
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u) stream<L>(y + i + u * W, value(load<L>(v + i + u * W)));
      }
      fence();
    }
  }
  for (; i + kUnroll * W <= n; i += kUnroll * W) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) store<L>(y + i + u * W, value(load<L>(v + i + u * W)));
  }
  for (; i + W <= n; i += W) store<L>(y + i, value(load<L>(v + i)));
  if (i < n) store_some<L>(y + i, value(load_some<L>(v + i, n - i, 0)), n - i);
}

// y[i] = v[i] - log(sum), the logarithm in two parts: a value close to it loses no digit.
template <class L>
void log_finish(const L* v, L* y, ptrdiff_t n, L high, L low, bool past_caches) {
  constexpr int W = Lane<L>::kWidth;
  ptrdiff_t i = 0;
  if (past_caches && reinterpret_cast<uintptr_t>(y) % sizeof(L) == 0) {
    while (i < n && reinterpret_cast<uintptr_t>(y + i) % kVectorBytes != 0) {
      y[i] = (v[i] - high) - low;
      ++i;
    }
    for (; i + W <= n; i += W) stream<L>(y + i, (load<L>(v + i) - high) - low);
    fence();
  }
  for (; i + W <= n; i += W) store<L>(y + i, (load<L>(v + i) - high) - low);
  for (; i < n; ++i) y[i] = (v[i] - high) - low;
}

// The sum of a part.
template <class T>
Pair softmax_sum(const Row& part) {
  using L = typename LaneOf<T>::Type;
  alignas(64) L buffer[kSegment];
  Pair sum{0, kNone, kNone};
  for (ptrdiff_t at = 0; at < part.n; at += kSegment) {
    const ptrdiff_t n = part.n - at < kSegment ? part.n - at : kSegment;
    pair_sum<L>(fetch<T>(part.in, at, n, buffer), n, sum);
  }
  return sum;
}

template <class T>
void softmax_finish(const Row& part, const Pair& sum) {
  using L = typename LaneOf<T>::Type;
  alignas(64) L buffer[kSegment];
  T* y = static_cast<T*>(part.y);
  int shift = 0;
  const double fraction = frexp(sum.m, &shift);
  const double logarithm = log(sum.m) + sum.e * 0.693147180559945309417;
  const L high = static_cast<L>(logarithm);
  const L low = static_cast<L>(logarithm - high);
  for (ptrdiff_t at = 0; at < part.n; at += kSegment) {
    const ptrdiff_t n = part.n - at < kSegment ? part.n - at : kSegment;
    const L* v = fetch<T>(part.in, at, n, buffer);
    L* out = buffer;
    if constexpr (sizeof(T) > 2) out = y + at;
    const bool past = part.stream && sizeof(T) > 2;
    if (part.log) {
      log_finish<L>(v, out, n, high, low, past);
    } else {
      pair_finish<L>(v, out, n, static_cast<L>(1 / fraction), static_cast<L>(sum.e + shift), past);
    }
    if constexpr (sizeof(T) == 2) put<T>(y + at, out, n);
  }
}

// With the maximum subtracted, in three sweeps over the input and one over the output: the value of
// every special row. All -infinity, +infinity and NaN give NaN; equal values give equal shares.
template <class T>
void softmax_special(const Row& row) {
  using L = typename LaneOf<T>::Type;
  alignas(64) L buffer[kSegment];
  alignas(64) L out[kSegment];
  const auto length = [&](ptrdiff_t at) { return row.n - at < kSegment ? row.n - at : kSegment; };
  L max = -kInfinity<L>;
  for (ptrdiff_t at = 0; at < row.n; at += kSegment) {
    max = max_of<L>(fetch<T>(row.in, at, length(at), buffer), length(at), max);
  }
  double sum = 0;
  for (ptrdiff_t at = 0; at < row.n; at += kSegment) {
    sum += exp_sum<L>(fetch<T>(row.in, at, length(at), buffer), nullptr, length(at), max);
  }
  const L inverse = static_cast<L>(1 / sum);
  const L logarithm = static_cast<L>(log(sum));
  for (ptrdiff_t at = 0; at < row.n; at += kSegment) {
    const ptrdiff_t n = length(at);
    const L* v = fetch<T>(row.in, at, n, buffer);
    if (row.log) {
      log_finish<L>(v, out, n, max, logarithm, false);
      put<T>(static_cast<T*>(row.y) + at, out, n);
    } else {
      exp_sum<L>(v, out, n, max);
      scale_into<T>(out, static_cast<T*>(row.y) + at, n, inverse);
    }
  }
}

template <class T>
ONNXNORM_INLINE void softmax_row(const Row& row) {
  using L = typename LaneOf<T>::Type;
  if (row.n <= 0) return;
  T* y = static_cast<T*>(row.y);
  if (!row.log) {
    if constexpr (sizeof(T) > 2) {
      if (row.n <= kSegment && !is_plain<T>(row.in)) {
        alignas(64) L buffer[kSegment];
        softmax_in_buffer<T>(row.in, y, row.n, buffer);
        return;
      }
      if (row.cached) {
        const L* v = static_cast<const L*>(row.in.x);
        if (!is_plain<T>(row.in)) {
          constexpr ptrdiff_t W = Lane<L>::kWidth;
          const ptrdiff_t whole = row.n - row.n % W;  // `stage` writes whole vectors
          alignas(64) L last[W];
          stage<T>(row.in, 0, whole, y);
          if (whole < row.n) {
            stage<T>(row.in, whole, row.n - whole, last);
            put<T>(y + whole, last, row.n - whole);
          }
          v = y;
        }
        const L max = max_of<L>(v, row.n, -kInfinity<L>);
        const double sum = exp_sum<L>(v, y, row.n, max);
        scale_into<T>(y, y, row.n, static_cast<L>(1 / sum));
        return;
      }
    } else if (row.n * ptrdiff_t{sizeof(L)} <= kScratchBytes) {
      alignas(64) L buffer[kScratchBytes / sizeof(L)];
      softmax_in_buffer<T>(row.in, y, row.n, buffer);
      return;
    }
  }
  const Pair sum = softmax_sum<T>(row);
  if (is_special_pair<L>(sum)) {
    softmax_special<T>(row);
  } else {
    softmax_finish<T>(row, sum);
  }
}

// Short rows, where waiting for a row's sum would cost as much as the row: the next row's maximum
// is searched before this row is scaled.
template <class L>
void softmax_short_rows(const Row& first, ptrdiff_t count, const RowStep& step) {
  const L* x = static_cast<const L*>(first.in.x);
  L* y = static_cast<L*>(first.y);
  L max = max_of<L>(x, first.n, -kInfinity<L>);
  for (ptrdiff_t r = 0; r < count; ++r) {
    const double sum = exp_sum<L>(x, y, first.n, max);
    x += step.x;
    if (r + 1 < count) max = max_of<L>(x, first.n, -kInfinity<L>);
    scale_into<L>(y, y, first.n, static_cast<L>(1 / sum));
    y += step.y;
  }
}

template <class T>
void softmax_rows(const Row& first, ptrdiff_t count, const RowStep& step) {
  if constexpr (sizeof(T) > 2) {
    if (!first.log && first.cached && first.n > 0 && first.n <= kSegment && is_plain<T>(first.in)) {
      softmax_short_rows<T>(first, count, step);
      return;
    }
  }
  Row row = first;
  for (ptrdiff_t r = 0; r < count; ++r) {
    softmax_row<T>(row);
    row.in.x = static_cast<const T*>(row.in.x) + step.x;
    if (row.in.mask != nullptr) row.in.mask = static_cast<const T*>(row.in.mask) + step.mask;
    row.y = static_cast<T*>(row.y) + step.y;
  }
}

// -- an outer axis: columns -----------------------------------------------------------------------

template <class T>
Source row_of(const Tile& tile, ptrdiff_t k) {
  Source in = tile.in;
  in.x = static_cast<const T*>(in.x) + k * tile.x_axis;
  if (in.mask != nullptr) in.mask = static_cast<const T*>(in.mask) + k * tile.mask_axis;
  return in;
}

ONNXNORM_INLINE bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
}

template <class T, class L = typename LaneOf<T>::Type>
ONNXNORM_INLINE void put_vector(T* y, Vec<L> v, ptrdiff_t count, bool past_caches) {
  if (count < Lane<L>::kWidth) {
    store_some_as<T>(y, v, count);
  } else if constexpr (sizeof(T) > 2) {
    if (past_caches)
      stream<L>(y, v);
    else
      store<L>(y, v);
  } else {
    store_as<T>(y, v);
  }
}

// The tile fits the scratch memory: each input is read once, however far apart the entries of the
// axis lie, and the rest happens in cache with one exponential an element. Sums over the axis are
// in the lane's type; the axis has at most kScratchBytes / 64 entries here.
template <class T>
void tile_in_scratch(const Tile& tile, ptrdiff_t padded) {
  using L = typename LaneOf<T>::Type;
  constexpr int W = Lane<L>::kWidth;
  constexpr int U = 2;
  alignas(64) L scratch[kScratchBytes / sizeof(L)];
  for (ptrdiff_t k = 0; k < tile.n; ++k) {
    stage<T>(row_of<T>(tile, k), 0, tile.width, scratch + k * padded);
  }
  T* y = static_cast<T*>(tile.y);
  const bool past =
      tile.stream && is_aligned(y) && tile.y_axis * ptrdiff_t{sizeof(T)} % kVectorBytes == 0;
  const auto block = [&](ptrdiff_t j, auto unrolled) __attribute__((always_inline)) {
    constexpr int unroll = decltype(unrolled)::value;
    L* column = scratch + j;
    Vec<L> max[unroll], sum[unroll];
    for (int u = 0; u < unroll; ++u) {
      max[u] = splat<L>(-kInfinity<L>);
      sum[u] = splat<L>(0);
    }
    for (ptrdiff_t k = 0; k < tile.n; ++k) {
      for (int u = 0; u < unroll; ++u) {
        max[u] = max_or_second(load<L>(column + k * padded + u * W), max[u]);
      }
    }
    for (ptrdiff_t k = 0; k < tile.n; ++k) {
      for (int u = 0; u < unroll; ++u) {
        L* at = column + k * padded + u * W;
        const Vec<L> shifted = load<L>(at) - max[u];
        const Vec<L> term = exp_nonpositive<L>(shifted);
        // Columns far apart may share their places in the caches, and then nothing else fetches y.
        if (!past) __builtin_prefetch(y + k * tile.y_axis + j + u * W, 1, 2);
        store<L>(at, tile.log ? shifted : term);
        sum[u] += term;
      }
    }
    for (int u = 0; u < unroll; ++u) {
      if (tile.log) {
        for (int i = 0; i < W; ++i) sum[u][i] = static_cast<L>(log(sum[u][i]));
      } else {
        sum[u] = 1 / sum[u];
      }
    }
    for (ptrdiff_t k = 0; k < tile.n; ++k) {
      for (int u = 0; u < unroll; ++u) {
        const Vec<L> e = load<L>(column + k * padded + u * W);
        put_vector<T>(y + k * tile.y_axis + j + u * W, tile.log ? e - sum[u] : e * sum[u],
                      tile.width - j - u * W, past);
      }
    }
  };
  ptrdiff_t j = 0;
  for (; j + U * W <= tile.width; j += U * W) block(j, Count<U>{});
  for (; j < tile.width; j += W) block(j, Count<1>{});
  if (past) fence();
}

// The tile does not fit: pairs run down the columns, each with its own exponent, in two sweeps.
// Sums are in the lane's type over kRun entries and in float64 beyond.
template <class T>
bool tile_by_pairs(const Tile& tile, ptrdiff_t padded) {
  using L = typename LaneOf<T>::Type;
  constexpr int W = Lane<L>::kWidth;
  constexpr ptrdiff_t kRun = 256;
  alignas(64) L buffer[kTileWidth];
  alignas(64) L m[kTileWidth];
  alignas(64) L e[kTileWidth];
  double total_m[kTileWidth];
  double total_e[kTileWidth];
  for (ptrdiff_t j = 0; j < padded; ++j) {
    m[j] = 0;
    e[j] = static_cast<L>(kNone);
    total_m[j] = 0;
    total_e[j] = kNone;
  }
  for (ptrdiff_t k = 0; k < tile.n; ++k) {
    stage<T>(row_of<T>(tile, k), 0, tile.width, buffer);
    for (ptrdiff_t j = 0; j < padded; j += W) {
      const Vec<L> x = bounded<L>(load<L>(buffer + j));
      const Vec<L> n = exponent<L>(x);
      const Vec<L> before = load<L>(e + j);
      const Vec<L> after = max_or_second(n, before);
      store<L>(m + j,
               scaled(load<L>(m + j), before - after) + scaled(mantissa<L>(x, n), n - after));
      store<L>(e + j, after);
    }
    if ((k + 1) % kRun == 0 || k + 1 == tile.n) {
      for (ptrdiff_t j = 0; j < tile.width; ++j) {
        total_m[j] = ldexp(total_m[j], static_cast<int>(total_e[j] - e[j])) + m[j];
        total_e[j] = e[j];
        m[j] = 0;
      }
    }
  }
  for (ptrdiff_t j = 0; j < tile.width; ++j) {
    if (is_special_pair<L>(Pair{total_m[j], total_e[j], total_e[j]})) return false;
  }
  // From here on: m = 1 / M and e = N, or the logarithm as m + e.
  for (ptrdiff_t j = 0; j < tile.width; ++j) {
    if (tile.log) {
      const double logarithm = log(total_m[j]) + total_e[j] * 0.693147180559945309417;
      m[j] = static_cast<L>(logarithm);
      e[j] = static_cast<L>(logarithm - m[j]);
    } else {
      int shift = 0;
      m[j] = static_cast<L>(1 / frexp(total_m[j], &shift));
      e[j] = static_cast<L>(total_e[j] + shift);
    }
  }
  T* y = static_cast<T*>(tile.y);
  const bool past =
      tile.stream && is_aligned(y) && tile.y_axis * ptrdiff_t{sizeof(T)} % kVectorBytes == 0;
  for (ptrdiff_t k = 0; k < tile.n; ++k) {
    const T* then = y + (k + 1 < tile.n ? k + 1 : k) * tile.y_axis;
    stage<T>(row_of<T>(tile, k), 0, tile.width, buffer);
    for (ptrdiff_t j = 0; j < tile.width; j += W) {
      if (!past) __builtin_prefetch(then + j, 1, 2);
      Vec<L> out = (load<L>(buffer + j) - load<L>(m + j)) - load<L>(e + j);
      if (!tile.log) {
        const Vec<L> x = bounded<L>(load<L>(buffer + j));
        const Vec<L> n = exponent<L>(x);
        out = scaled(mantissa<L>(x, n) * load<L>(m + j), n - load<L>(e + j));
      }
      put_vector<T>(y + k * tile.y_axis + j, out, tile.width - j, past);
    }
  }
  if (past) fence();
  return true;
}

// With each column's maximum subtracted, in three sweeps.
template <class T>
void tile_special(const Tile& tile, ptrdiff_t padded) {
  using L = typename LaneOf<T>::Type;
  constexpr int W = Lane<L>::kWidth;
  alignas(64) L buffer[kTileWidth];
  alignas(64) L max[kTileWidth];
  alignas(64) L factor[kTileWidth];
  double sum[kTileWidth];
  for (ptrdiff_t j = 0; j < padded; ++j) {
    max[j] = -kInfinity<L>;
    sum[j] = 0;
  }
  for (ptrdiff_t k = 0; k < tile.n; ++k) {
    stage<T>(row_of<T>(tile, k), 0, tile.width, buffer);
    for (ptrdiff_t j = 0; j < padded; j += W) {
      store<L>(max + j, max_or_second(load<L>(buffer + j), load<L>(max + j)));
    }
  }
  for (ptrdiff_t k = 0; k < tile.n; ++k) {
    stage<T>(row_of<T>(tile, k), 0, tile.width, buffer);
    for (ptrdiff_t j = 0; j < padded; j += W) {
      store<L>(buffer + j, exp_nonpositive<L>(load<L>(buffer + j) - load<L>(max + j)));
    }
    for (ptrdiff_t j = 0; j < tile.width; ++j) sum[j] += buffer[j];
  }
  for (ptrdiff_t j = 0; j < tile.width; ++j) {
    factor[j] = static_cast<L>(tile.log ? log(sum[j]) : 1 / sum[j]);
  }
  T* y = static_cast<T*>(tile.y);
  for (ptrdiff_t k = 0; k < tile.n; ++k) {
    stage<T>(row_of<T>(tile, k), 0, tile.width, buffer);
    for (ptrdiff_t j = 0; j < tile.width; j += W) {
      const Vec<L> shifted = load<L>(buffer + j) - load<L>(max + j);
      const Vec<L> out = tile.log ? shifted - load<L>(factor + j)
                                  : exp_nonpositive<L>(shifted) * load<L>(factor + j);
      put_vector<T>(y + k * tile.y_axis + j, out, tile.width - j, false);
    }
  }
}

template <class T>
void softmax_tile(const Tile& tile) {
  using L = typename LaneOf<T>::Type;
  constexpr int W = Lane<L>::kWidth;
  if (tile.n <= 0 || tile.width <= 0) return;
  const ptrdiff_t padded = (tile.width + W - 1) / W * W;
  if (tile.n <= kScratchBytes / ptrdiff_t{sizeof(L)} / padded) {
    tile_in_scratch<T>(tile, padded);
  } else if (!tile_by_pairs<T>(tile, padded)) {
    tile_special<T>(tile, padded);
  }
}

// -- normalization --------------------------------------------------------------------------------
//
// The variance is the corrected two-pass one: with c close to the mean,
//   mean = c + S1 / n,  variance = S2 / n - (S1 / n)^2,  Sk = sum (x - c)^k,
// so a large common mean costs no digits.

template <class T>
double norm_sum(const void* data, ptrdiff_t n) {
  using L = typename LaneOf<T>::Type;
  constexpr int W = Lane<L>::kWidth;
  const T* x = static_cast<const T*>(data);
  double sum = 0;
  for (ptrdiff_t start = 0; start < n; start += kSegment) {
    const ptrdiff_t stop = n - start < kSegment ? n : start + kSegment;
    Vec<L> sums[kUnroll] = {};
    ptrdiff_t i = start;
    for (; i + kUnroll * W <= stop; i += kUnroll * W) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) sums[u] += load_as<T>(x + i + u * W);
    }
    for (; i + W <= stop; i += W) sums[0] += load_as<T>(x + i);
    if (i < stop) sums[1] += load_some_as<T>(x + i, stop - i, 0);
    sum += total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return sum;
}

template <class T>
Moments norm_moments(const void* data, ptrdiff_t n, double center) {
  using L = typename LaneOf<T>::Type;
  constexpr int W = Lane<L>::kWidth;
  const T* x = static_cast<const T*>(data);
  const L c = static_cast<L>(center);
  Moments moments{0, 0};
  for (ptrdiff_t start = 0; start < n; start += kSegment) {
    const ptrdiff_t stop = n - start < kSegment ? n : start + kSegment;
    Vec<L> first[kUnroll] = {};
    Vec<L> second[kUnroll] = {};
    ptrdiff_t i = start;
    for (; i + kUnroll * W <= stop; i += kUnroll * W) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        const Vec<L> d = load_as<T>(x + i + u * W) - c;
        first[u] += d;
        second[u] += d * d;
      }
    }
    for (; i < stop; i += W) {
      const Vec<L> d =
          (i + W <= stop ? load_as<T>(x + i) : load_some_as<T>(x + i, stop - i, c)) - c;
      first[0] += d;
      second[0] += d * d;
    }
    moments.first += total((first[0] + first[1]) + (first[2] + first[3]));
    moments.second += total((second[0] + second[1]) + (second[2] + second[3]));
  }
  return moments;
}

// v / (1 + e^-v); for v below -87 in float32 (-708 in float64) it is the limit 0 or -0.
template <class L>
ONNXNORM_INLINE Vec<L> silu_of(Vec<L> v) {
  // e^-|v| never overflows; for negative v both sides of the fraction are multiplied by e^v.
  const Vec<L> e = exp_nonpositive<L>(min_or_second(v, -v));
  const Vec<L> numerator = v < 0 ? v * e : v;
  return numerator / (1 + e);
}

enum class Step { kZero, kOne };

template <class T, Step scale_step, Step bias_step, bool silu>
void affine_row(const Affine& a) {
  using L = typename LaneOf<T>::Type;
  constexpr int W = Lane<L>::kWidth;
  const T* x = static_cast<const T*>(a.x);
  const T* scale = static_cast<const T*>(a.scale);
  const T* bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y);
  const L center = static_cast<L>(a.center);
  const L rest = static_cast<L>((a.center - center) + a.rest);
  const L inverse = static_cast<L>(a.inverse);
  const L one_scale = scale_step == Step::kZero ? load_one<T>(scale, 0) : L(0);
  const L one_bias = bias_step == Step::kZero && bias != nullptr ? load_one<T>(bias, 0) : L(0);
  const bool past = a.stream && is_aligned(y);
  const auto finish = [=](Vec<L> v, Vec<L> g, Vec<L> b) __attribute__((always_inline)) {
    v = ((v - center) - rest) * inverse * g + b;
    if constexpr (silu) v = silu_of<L>(v);
    return v;
  };
  ptrdiff_t i = 0;
#pragma GCC unroll 2
  for (; i + W <= a.n; i += W) {
    Vec<L> g = splat<L>(one_scale);
    Vec<L> b = splat<L>(one_bias);
    if constexpr (scale_step == Step::kOne) g = load_as<T>(scale + i);
    if constexpr (bias_step == Step::kOne) b = load_as<T>(bias + i);
    put_vector<T>(y + i, finish(load_as<T>(x + i), g, b), W, past);
  }
  if (i < a.n) {
    const ptrdiff_t last = a.n - i;
    Vec<L> g = splat<L>(one_scale);
    Vec<L> b = splat<L>(one_bias);
    if constexpr (scale_step == Step::kOne) g = load_some_as<T>(scale + i, last, 0);
    if constexpr (bias_step == Step::kOne) b = load_some_as<T>(bias + i, last, 0);
    store_some_as<T>(y + i, finish(load_some_as<T>(x + i, last, 0), g, b), last);
  }
  if (past) fence();
}

template <class T, bool silu>
void affine_steps(const Affine& a) {
  const bool vector_scale = a.scale_step == 1;
  const bool vector_bias = a.bias != nullptr && a.bias_step == 1;
  if (vector_scale && vector_bias)
    affine_row<T, Step::kOne, Step::kOne, silu>(a);
  else if (vector_scale)
    affine_row<T, Step::kOne, Step::kZero, silu>(a);
  else if (vector_bias)
    affine_row<T, Step::kZero, Step::kOne, silu>(a);
  else
    affine_row<T, Step::kZero, Step::kZero, silu>(a);
}

template <class T>
void norm_affine(const Affine& a) {
  if (a.silu)
    affine_steps<T, true>(a);
  else
    affine_steps<T, false>(a);
}

// What is known of the columns of a tile, in the first-level cache. While rows are taken, `first`
// and `second` are sums of x - center and of its square, with what their roundings lost so far
// (Kahan's sums); in the end y = (x - center) * first + second.
template <class L>
struct ColumnStatistics {
  alignas(64) L center[kNormWidth];
  alignas(64) L first[kNormWidth];
  alignas(64) L second[kNormWidth];
  alignas(64) L lost_first[kNormWidth];
  alignas(64) L lost_second[kNormWidth];
};

// A variance is taken about a guess of the mean. Where that is off by more than the root of so many
// variances, too many digits would be lost, and it is taken once more about the mean.
constexpr int kFarSquared = 3;
constexpr int kGuessed = 8;  // entries that the guess is the mean of

// The entries of the normalized axes in order.
class Entries {
 public:
  explicit Entries(const Walk& walk) : walk_(walk) {
    if (walk.table == nullptr) walk.first(walk.self);
  }
  ONNXNORM_INLINE Offsets next() {
    if (walk_.table == nullptr) return walk_.next(walk_.self);
    const Offsets at = walk_.table[k_++];
    return {walk_.start.x + at.x, walk_.start.scale + at.scale, walk_.start.bias + at.bias};
  }

 private:
  const Walk& walk_;
  ptrdiff_t k_ = 0;
};

// `take(j, count)` for vectors of neighbouring columns; `count` is known where it is a whole
// vector.
template <class L, class Take>
ONNXNORM_INLINE void for_columns(ptrdiff_t width, const Take& take) {
  constexpr ptrdiff_t W = Lane<L>::kWidth;
  ptrdiff_t j = 0;
#pragma GCC unroll 4
  for (; j + W <= width; j += W) take(j, W);
  if (j < width) take(j, width - j);
}

template <class T>
ONNXNORM_INLINE Vec<typename LaneOf<T>::Type> load_columns(const T* p, ptrdiff_t count) {
  if (count == Lane<typename LaneOf<T>::Type>::kWidth) return load_as<T>(p);
  return load_some_as<T>(p, count, 0);
}

template <class L>
ONNXNORM_INLINE void add_to(L* sum, L* lost, Vec<L> more) {
  const Vec<L> old = load<L>(sum);
  const Vec<L> mended = more - load<L>(lost);
  const Vec<L> now = old + mended;
  // What an infinite sum lost is no number, and must not make it none.
  store<L>(lost, now < kInfinity<L> ? (now - old) - mended : Vec<L>{});
  store<L>(sum, now);
}

template <class T, int rows, class L = typename LaneOf<T>::Type>
ONNXNORM_INLINE void take_rows(const T* x, const ptrdiff_t (&at)[rows], ptrdiff_t width,
                               ColumnStatistics<L>& s) {
  for_columns<L>(width, [&](ptrdiff_t j, ptrdiff_t count) __attribute__((always_inline)) {
    const Vec<L> center = load<L>(s.center + j);
    Vec<L> first{}, second{};
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec<L> d = load_columns<T>(x + at[r] + j, count) - center;
      first += d;
      second += d * d;
    }
    add_to<L>(s.first + j, s.lost_first + j, first);
    add_to<L>(s.second + j, s.lost_second + j, second);
  });
}

// The means of x - center and of its square, into `s.first` and `s.second`.
template <class T, class L = typename LaneOf<T>::Type>
void column_moments(const Columns& c, const Walk& walk, ColumnStatistics<L>& s) {
  constexpr int kRows = 8;
  const T* x = static_cast<const T*>(c.x);
  const ptrdiff_t n = walk.entries;
  for_columns<L>(c.width, [&](ptrdiff_t j, ptrdiff_t) __attribute__((always_inline)) {
    store<L>(s.first + j, Vec<L>{});
    store<L>(s.second + j, Vec<L>{});
    store<L>(s.lost_first + j, Vec<L>{});
    store<L>(s.lost_second + j, Vec<L>{});
  });
  Entries entries(walk);
  ptrdiff_t k = 0;
  for (; k + kRows <= n; k += kRows) {
    ptrdiff_t at[kRows];
    for (ptrdiff_t& offset : at) offset = entries.next().x;
    take_rows<T>(x, at, c.width, s);
  }
  for (; k < n; ++k) {
    const ptrdiff_t at[1] = {entries.next().x};
    take_rows<T>(x, at, c.width, s);
  }
  const L share = static_cast<L>(1 / static_cast<double>(n));
  for_columns<L>(c.width, [&](ptrdiff_t j, ptrdiff_t) __attribute__((always_inline)) {
    store<L>(s.first + j, load<L>(s.first + j) * share);
    store<L>(s.second + j, load<L>(s.second + j) * share);
  });
}

// A guess of the mean, from entries that are spread over the axes where that costs nothing.
template <class T, class L = typename LaneOf<T>::Type>
void guess_centers(const Columns& c, const Walk& walk, ColumnStatistics<L>& s) {
  const T* x = static_cast<const T*>(c.x);
  const ptrdiff_t n = walk.entries;
  const T* heads[kGuessed];
  Entries entries(walk);
  const ptrdiff_t first = entries.next().x;
  for (ptrdiff_t i = 0; i < kGuessed; ++i) {
    const ptrdiff_t spread = i * n / kGuessed;  // the first one over and over where there are few
    heads[i] = x + (walk.table == nullptr ? first : walk.start.x + walk.table[spread].x);
  }
  for_columns<L>(c.width, [&](ptrdiff_t j, ptrdiff_t count) __attribute__((always_inline)) {
    const auto head = [&](int i) __attribute__((always_inline)) {
      return load_columns<T>(heads[i] + j, count);
    };
    // By pairs: the mean of equal values has to be that value.
    const Vec<L> sum =
        ((head(0) + head(1)) + (head(2) + head(3))) + ((head(4) + head(5)) + (head(6) + head(7)));
    store<L>(s.center + j, c.centered ? sum * L(1.0 / kGuessed) : Vec<L>{});
  });
}

// Moves each center to the mean, and leaves in `s.first` what it, as a number of the lane's type,
// is still off by. False: one was too far for its variance to be right, or there is a NaN.
template <class L>
bool move_to_mean(const Columns& c, ColumnStatistics<L>& s) {
  bool near = true;
  for_columns<L>(c.width, [&](ptrdiff_t j, ptrdiff_t) __attribute__((always_inline)) {
    const Vec<L> rest = load<L>(s.first + j);
    const Vec<L> variance = load<L>(s.second + j) - rest * rest;
    near &= all_within(rest * rest, variance * L(kFarSquared));
    const Vec<L> guess = load<L>(s.center + j);
    const Vec<L> mean = guess + rest;
    store<L>(s.center + j, mean);
    store<L>(s.first + j, rest - (mean - guess));
    store<L>(s.second + j, variance);
  });
  return near;
}

template <class T, class L = typename LaneOf<T>::Type>
void column_statistics(const Columns& c, const Walk& walk, ColumnStatistics<L>& s) {
  guess_centers<T>(c, walk, s);
  column_moments<T>(c, walk, s);
  if (c.centered && !move_to_mean<L>(c, s)) {
    column_moments<T>(c, walk, s);
    move_to_mean<L>(c, s);
  }
  for_columns<L>(c.width, [&](ptrdiff_t j, ptrdiff_t) __attribute__((always_inline)) {
    const Vec<L> variance = load<L>(s.second + j);
    // Not max: a NaN has to stay one.
    const Vec<L> guarded = (variance < 0 ? Vec<L>{} : variance) + static_cast<L>(c.epsilon);
    const Vec<L> inverse = 1 / square_root(guarded);
    const Vec<L> rest = c.centered ? load<L>(s.first + j) : Vec<L>{};
    store<L>(s.first + j, inverse);
    store<L>(s.second + j, -rest * inverse);
  });
}

// The results of `rows` entries; those at `then` are written next.
template <class T, int rows, bool vectors, bool silu, class L = typename LaneOf<T>::Type>
ONNXNORM_INLINE void put_rows(const Columns& c, const Offsets (&at)[rows],
                              const Offsets (&then)[rows], const ColumnStatistics<L>& s) {
  const T* x = static_cast<const T*>(c.x);
  T* y = static_cast<T*>(c.y);
  const bool scales = c.scale_step == 1;
  const bool biases = c.bias != nullptr && c.bias_step == 1;
  const T* scale[rows];
  const T* bias[rows];
  Vec<L> g[rows], b[rows];
  bool past = c.stream;
  for (int r = 0; r < rows; ++r) {
    scale[r] = static_cast<const T*>(c.scale) + at[r].scale;
    bias[r] = c.bias == nullptr ? nullptr : static_cast<const T*>(c.bias) + at[r].bias;
    g[r] = splat<L>(scales ? L(0) : load_one<T>(scale[r], 0));
    b[r] = splat<L>(biases || c.bias == nullptr ? L(0) : load_one<T>(bias[r], 0));
    past &= is_aligned(y + at[r].x);
  }
  for_columns<L>(c.width, [&](ptrdiff_t j, ptrdiff_t count) __attribute__((always_inline)) {
    const Vec<L> center = load<L>(s.center + j);
    const Vec<L> first = load<L>(s.first + j);
    const Vec<L> second = load<L>(s.second + j);
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
      if (!past) __builtin_prefetch(y + then[r].x + j, 1, 2);
      if constexpr (vectors) {
        if (scales) g[r] = load_columns<T>(scale[r] + j, count);
        if (biases) b[r] = load_columns<T>(bias[r] + j, count);
      }
      const Vec<L> d = load_columns<T>(x + at[r].x + j, count) - center;
      Vec<L> out = (d * first + second) * g[r] + b[r];
      if constexpr (silu) out = silu_of<L>(out);
      put_vector<T>(y + at[r].x + j, out, count, past);
    }
  });
}

// Two sweeps over a tile that the second-level cache keeps: statistics, then results. A row of a
// tile lies in one page or two and is as long as a prefetcher needs to see.
template <class T, bool vectors, bool silu>
void columns_of(const Columns& c, const Walk& walk) {
  using L = typename LaneOf<T>::Type;
  constexpr int kRows = 2;  // so that what is known of a column is loaded half as often
  ColumnStatistics<L> s;
  column_statistics<T>(c, walk, s);
  Entries entries(walk);
  Offsets then[kRows];
  const auto step = [&]() __attribute__((always_inline)) {
    for (Offsets& offset : then) offset = entries.next();
  };
  ptrdiff_t left = walk.entries;
  if (left >= kRows) step();
  for (; left >= kRows; left -= kRows) {
    Offsets at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = then[r];
    if (left >= 2 * kRows) step();
    put_rows<T, kRows, vectors, silu>(c, at, then, s);
  }
  for (; left > 0; --left) {
    const Offsets last[1] = {entries.next()};
    put_rows<T, 1, vectors, silu>(c, last, last, s);
  }
  if (c.stream) fence();
}

template <class T, bool vectors>
void columns_of(const Columns& c, const Walk& walk) {
  if (c.silu)
    columns_of<T, vectors, true>(c, walk);
  else
    columns_of<T, vectors, false>(c, walk);
}

template <class T>
void norm_columns(const Columns& c, const Walk& walk) {
  if (c.scale_step == 1 || (c.bias != nullptr && c.bias_step == 1))
    columns_of<T, true>(c, walk);
  else
    columns_of<T, false>(c, walk);
}

template <class T>
constexpr Softmax softmax_table() {
  using L = typename LaneOf<T>::Type;
  return {softmax_rows<T>,    softmax_sum<T>,     softmax_finish<T>,
          softmax_special<T>, is_special_pair<L>, softmax_tile<T>};
}

template <class T>
constexpr Norm norm_table() {
  return {norm_sum<T>, norm_moments<T>, norm_affine<T>, norm_columns<T>};
}

#define ONNXNORM_TEXT_(name) #name
#define ONNXNORM_TEXT(name) ONNXNORM_TEXT_(name)
#define ONNXNORM_JOIN_(a, b) a##b
#define ONNXNORM_JOIN(a, b) ONNXNORM_JOIN_(a, b)

constexpr Kernels kKernels = {
    ONNXNORM_TEXT(ONNXNORM_ISA),
    {softmax_table<float>(), softmax_table<F16>(), softmax_table<BF16>(), softmax_table<double>()},
    {norm_table<float>(), norm_table<F16>(), norm_table<BF16>(), norm_table<double>()},
};

}  // namespace

const Kernels* ONNXNORM_JOIN(ONNXNORM_ISA, _kernels)() { return &kKernels; }

}  // namespace onnxnorm
