// The operators' kernels for a GPU, over device.h.
//
// float16, bfloat16 and float32 are computed in float32, float64 in float64. Sums of many terms are
// kept with what their roundings lost (TwoSum), so their error does not grow with a row's length.
// A sum of exponentials is kept with the largest value so far, and scaled where that grows: one
// sweep for a sum of any values, in any order, by any number of threads.
#pragma once

#include "device.h"

namespace onnxnorm::device {

constexpr int kMostDims = 12;  // after merging
constexpr int kSpaceOperands = 3;

struct At {
  std::int64_t operand[kSpaceOperands];
};

// A part of an index space: sizes, and for each operand the elements between two steps.
struct Space {
  int rank;
  std::int64_t size[kMostDims];
  std::int64_t stride[kMostDims][kSpaceOperands];
};

// Where each operand stands at position `index`, last dimension fastest.
ONNXNORM_DEVICE At locate(const Space& space, std::int64_t index) {
  At at{};
  for (int i = space.rank - 1; i >= 0; --i) {
    const std::int64_t outer = i == 0 ? 0 : index / space.size[i];
    const std::int64_t step = index - outer * space.size[i];
    for (int k = 0; k < kSpaceOperands; ++k) at.operand[k] += step * space.stride[i][k];
    index = outer;
  }
  return at;
}

// -- sums -----------------------------------------------------------------------------------------

// high + low: a sum, and what its roundings lost.
template <class L>
struct Sum {
  L high;
  L low;
};

template <class L>
ONNXNORM_DEVICE void add(Sum<L>& sum, L term) {
  const L next = sum.high + term;
  const L part = next - sum.high;
  sum.low += (sum.high - (next - part)) + (term - part);
  sum.high = next;
}

template <class L>
ONNXNORM_DEVICE L value(const Sum<L>& sum) {
  // Of an infinite sum the lost part is no number.
  return sum.high - sum.high == 0 ? sum.high + sum.low : sum.high;
}

// The sum of e^(v - max) over some values v, and their largest. The empty one is {-inf, {0, 0}}.
template <class L>
struct Mass {
  L max;
  Sum<L> sum;
};

template <class L>
ONNXNORM_DEVICE Mass<L> no_mass() {
  return {-static_cast<L>(INFINITY), {0, 0}};
}

// What to subtract: a row of -infinity gives terms of 0 and so the quotient 0 / 0.
template <class L>
ONNXNORM_DEVICE L shift_of(L max) {
  return max == -static_cast<L>(INFINITY) ? L(0) : max;
}

template <class L>
ONNXNORM_DEVICE void rescale(Mass<L>& mass, L max) {
  const L factor = exp_of(mass.max - max);  // 0 for what was empty or of -infinity only
  mass.sum.high *= factor;
  mass.sum.low *= factor;
  mass.max = max;
}

template <class L>
ONNXNORM_DEVICE void add(Mass<L>& mass, L v) {
  if (v > mass.max) rescale(mass, v);  // false for a NaN, which makes the sum one
  add(mass.sum, exp_of(v - shift_of(mass.max)));
}

template <class L>
ONNXNORM_DEVICE void join(Sum<L>& a, const Sum<L>& b) {
  add(a, b.high);
  a.low += b.low;
}

template <class L>
ONNXNORM_DEVICE void join(Mass<L>& a, Mass<L> b) {
  if (b.max > a.max) rescale(a, b.max);
  if (a.max > b.max) rescale(b, a.max);
  join(a.sum, b.sum);
}

// Of two partial results in a warp, both lanes compute a joined with b in one order, so that all
// lanes come to the same bits.
template <class P>
ONNXNORM_DEVICE void join_ordered(P& mine, const P& other, int lanes) {
  P first = (thread_index() & lanes) == 0 ? mine : other;
  const P second = (thread_index() & lanes) == 0 ? other : mine;
  join(first, second);
  mine = first;
}

template <class L>
ONNXNORM_DEVICE Sum<L> shuffled(const Sum<L>& sum, int lanes) {
  return {shuffle_xor(sum.high, lanes), shuffle_xor(sum.low, lanes)};
}

template <class L>
ONNXNORM_DEVICE Mass<L> shuffled(const Mass<L>& mass, int lanes) {
  return {shuffle_xor(mass.max, lanes), shuffled(mass.sum, lanes)};
}

// The results of all lanes of a warp joined, in every lane.
template <class P>
ONNXNORM_DEVICE P over_warp(P mine) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) join_ordered(mine, shuffled(mine, lanes), lanes);
  return mine;
}

// The results of all threads of a block joined, in every thread.
template <class P>
ONNXNORM_DEVICE P over_block(P mine) {
  ONNXNORM_SHARED(P, of_warp, kMostThreads / kWarp);
  mine = over_warp(mine);
  if (threads() == kWarp) return mine;
  if (thread_index() % kWarp == 0) of_warp[thread_index() / kWarp] = mine;
  barrier();
  mine = of_warp[0];
  for (int w = 1; w < threads() / kWarp; ++w) join(mine, of_warp[w]);
  barrier();  // before the memory is used again
  return mine;
}

// The results of the threads of one column joined, in all of them: threads stand in rows of kWarp
// columns.
template <class P>
ONNXNORM_DEVICE P over_column(const P& mine) {
  ONNXNORM_SHARED(P, of_thread, kMostThreads);
  if (threads() == kWarp) return mine;
  of_thread[thread_index()] = mine;
  barrier();
  const int column = thread_index() % kWarp;
  P joined = of_thread[column];
  for (int row = 1; row < threads() / kWarp; ++row) join(joined, of_thread[row * kWarp + column]);
  barrier();
  return joined;
}

// -- softmax --------------------------------------------------------------------------------------

constexpr int kOfX = 0, kOfMask = 1, kOfY = 2;

template <class T>
struct SoftmaxOperands {
  using L = typename LaneOf<T>::Type;
  const T* x;
  const T* mask;   // null: none
  const T* scale;  // null: `factor`
  L factor;
  T* y;
  bool log;
  Space items;  // all dimensions but the axis
  std::int64_t count;
  std::int64_t n;  // along the axis
  std::int64_t step[kSpaceOperands];

  ONNXNORM_DEVICE L scaling() const { return scale == nullptr ? factor : widen(*scale); }

  ONNXNORM_DEVICE L load(const At& item, std::int64_t k, L scaled_by) const {
    const L v = widen(x[item.operand[kOfX] + k * step[kOfX]]) * scaled_by;
    if (mask == nullptr) return v;
    return v + widen(mask[item.operand[kOfMask] + k * step[kOfMask]]);
  }

  // `part` is 1 / sum, or log(sum).
  ONNXNORM_DEVICE void store(const At& item, std::int64_t k, L v, L shift, L part) const {
    const L result = log ? (v - shift) - part : exp_of(v - shift) * part;
    narrow(result, &y[item.operand[kOfY] + k * step[kOfY]]);
  }

  ONNXNORM_DEVICE L part(const Mass<L>& mass) const {
    const L sum = value(mass.sum);
    return log ? log_of(sum) : 1 / sum;
  }
};

// A row in the registers of a warp: n <= kItems * kWarp, and each value is read once.
template <class T, int kItems>
struct SoftmaxWarps : SoftmaxOperands<T> {
  using L = typename LaneOf<T>::Type;
  ONNXNORM_DEVICE void operator()() const {
    const int lane = thread_index() % kWarp;
    const int warps = threads() / kWarp;
    const L scaled_by = this->scaling();
    for (std::int64_t item = block_index() * warps + thread_index() / kWarp; item < this->count;
         item += blocks() * warps) {
      const At at = locate(this->items, item);
      L v[kItems];
      Mass<L> mass = no_mass<L>();
      ONNXNORM_UNROLL
      for (int i = 0; i < kItems; ++i) {
        const std::int64_t k = i * kWarp + lane;
        if (k < this->n) {
          v[i] = this->load(at, k, scaled_by);
          if (v[i] > mass.max) mass.max = v[i];
        }
      }
      const L shift = shift_of(mass.max);
      ONNXNORM_UNROLL
      for (int i = 0; i < kItems; ++i) {
        if (i * kWarp + lane < this->n) add(mass.sum, exp_of(v[i] - shift));
      }
      mass = over_warp(mass);
      const L part = this->part(mass);
      const L last = shift_of(mass.max);
      ONNXNORM_UNROLL
      for (int i = 0; i < kItems; ++i) {
        const std::int64_t k = i * kWarp + lane;
        if (k < this->n) this->store(at, k, v[i], last, part);
      }
    }
  }
};

// A row by a block, in two sweeps.
template <class T>
struct SoftmaxBlocks : SoftmaxOperands<T> {
  using L = typename LaneOf<T>::Type;
  ONNXNORM_DEVICE void operator()() const {
    const L scaled_by = this->scaling();
    for (std::int64_t item = block_index(); item < this->count; item += blocks()) {
      const At at = locate(this->items, item);
      Mass<L> mass = no_mass<L>();
      for (std::int64_t k = thread_index(); k < this->n; k += threads()) {
        add(mass, this->load(at, k, scaled_by));
      }
      mass = over_block(mass);
      const L part = this->part(mass);
      const L shift = shift_of(mass.max);
      for (std::int64_t k = thread_index(); k < this->n; k += threads()) {
        this->store(at, k, this->load(at, k, scaled_by), shift, part);
      }
    }
  }
};

// Few long rows: each in `parts` parts of `each` values. First the sums of the parts, then, in a
// second launch, the outputs. The parts depend on the shape alone, and so do the bits of a result.
template <class T>
struct SoftmaxPartSums : SoftmaxOperands<T> {
  using L = typename LaneOf<T>::Type;
  Mass<L>* sums;
  std::int64_t parts;
  std::int64_t each;
  ONNXNORM_DEVICE void operator()() const {
    const L scaled_by = this->scaling();
    for (std::int64_t task = block_index(); task < this->count * parts; task += blocks()) {
      const At at = locate(this->items, task / parts);
      const std::int64_t from = task % parts * each;
      const std::int64_t to = from + each < this->n ? from + each : this->n;
      Mass<L> mass = no_mass<L>();
      for (std::int64_t k = from + thread_index(); k < to; k += threads()) {
        add(mass, this->load(at, k, scaled_by));
      }
      mass = over_block(mass);
      if (thread_index() == 0) sums[task] = mass;
    }
  }
};

template <class T>
struct SoftmaxPartOutputs : SoftmaxOperands<T> {
  using L = typename LaneOf<T>::Type;
  const Mass<L>* sums;
  std::int64_t parts;
  std::int64_t each;
  ONNXNORM_DEVICE void operator()() const {
    const L scaled_by = this->scaling();
    for (std::int64_t task = block_index(); task < this->count * parts; task += blocks()) {
      const std::int64_t item = task / parts;
      const At at = locate(this->items, item);
      const std::int64_t from = task % parts * each;
      const std::int64_t to = from + each < this->n ? from + each : this->n;
      Mass<L> mass = no_mass<L>();
      for (std::int64_t p = thread_index(); p < parts; p += threads()) {
        join(mass, sums[item * parts + p]);
      }
      mass = over_block(mass);
      const L part = this->part(mass);
      const L shift = shift_of(mass.max);
      for (std::int64_t k = from + thread_index(); k < to; k += threads()) {
        this->store(at, k, this->load(at, k, scaled_by), shift, part);
      }
    }
  }
};

// Neighbouring columns by neighbouring lanes, for an axis that is not the innermost: threads stand
// in rows of kWarp columns, and the rows share out the axis. With kItems > 0 each thread keeps its
// at most kItems values; else they are read twice.
template <class T, int kItems>
struct SoftmaxColumns : SoftmaxOperands<T> {
  using L = typename LaneOf<T>::Type;
  ONNXNORM_DEVICE void operator()() const {
    const int row = thread_index() / kWarp;
    const int rows = threads() / kWarp;
    const L scaled_by = this->scaling();
    const std::int64_t tiles = (this->count + kWarp - 1) / kWarp;
    for (std::int64_t tile = block_index(); tile < tiles; tile += blocks()) {
      const std::int64_t column = tile * kWarp + thread_index() % kWarp;
      const std::int64_t n = column < this->count ? this->n : 0;  // no return: others wait for us
      const At at = locate(this->items, n == 0 ? 0 : column);
      Mass<L> mass = no_mass<L>();
      if constexpr (kItems > 0) {
        L v[kItems];
        ONNXNORM_UNROLL
        for (int i = 0; i < kItems; ++i) {
          if (row + i * rows < n) {
            v[i] = this->load(at, row + i * rows, scaled_by);
            if (v[i] > mass.max) mass.max = v[i];
          }
        }
        const L shift = shift_of(mass.max);
        ONNXNORM_UNROLL
        for (int i = 0; i < kItems; ++i) {
          if (row + i * rows < n) add(mass.sum, exp_of(v[i] - shift));
        }
        mass = over_column(mass);
        const L part = this->part(mass);
        const L last = shift_of(mass.max);
        ONNXNORM_UNROLL
        for (int i = 0; i < kItems; ++i) {
          if (row + i * rows < n) this->store(at, row + i * rows, v[i], last, part);
        }
      } else {
        for (std::int64_t k = row; k < n; k += rows) add(mass, this->load(at, k, scaled_by));
        mass = over_column(mass);
        const L part = this->part(mass);
        const L shift = shift_of(mass.max);
        for (std::int64_t k = row; k < n; k += rows) {
          this->store(at, k, this->load(at, k, scaled_by), shift, part);
        }
      }
    }
  }
};

// -- normalization --------------------------------------------------------------------------------
//
// The variance is the corrected two-pass one, as in kernels.cc: with c close to the mean,
//   mean = c + S1 / n,  variance = S2 / n - (S1 / n)^2,  Sk = sum (x - c)^k.

constexpr int kOfScale = 1, kOfBias = 2;

template <class L>
struct Moments {
  Sum<L> first;
  Sum<L> second;
};

template <class L>
ONNXNORM_DEVICE void join(Moments<L>& a, const Moments<L>& b) {
  join(a.first, b.first);
  join(a.second, b.second);
}

template <class L>
ONNXNORM_DEVICE Moments<L> shuffled(const Moments<L>& moments, int lanes) {
  return {shuffled(moments.first, lanes), shuffled(moments.second, lanes)};
}

template <class L>
ONNXNORM_DEVICE void add(Moments<L>& moments, L deviation) {
  add(moments.first, deviation);
  add(moments.second, deviation * deviation);
}

// y = ((x - center) - rest) * inverse * scale + bias
template <class L>
struct Statistics {
  L center;
  L rest;
  L inverse;
};

template <class T>
struct NormOperands {
  using L = typename LaneOf<T>::Type;
  const T* x;
  const T* scale;
  const T* bias;  // null: none
  T* y;
  Space kept;
  Space reduced;
  std::int64_t count;  // of kept
  std::int64_t n;      // of reduced
  L epsilon;
  bool centered;  // layer norm; else RMS norm
  bool silu;

  ONNXNORM_DEVICE At entry(const At& item, std::int64_t k) const {
    At at = locate(reduced, k);
    for (int i = 0; i < kSpaceOperands; ++i) at.operand[i] += item.operand[i];
    return at;
  }

  ONNXNORM_DEVICE L load(const At& item, std::int64_t k) const {
    return widen(x[entry(item, k).operand[kOfX]]);
  }

  ONNXNORM_DEVICE L center(const Sum<L>& sum) const { return value(sum) / static_cast<L>(n); }

  ONNXNORM_DEVICE Statistics<L> statistics(L center, const Moments<L>& moments) const {
    const L rest = centered ? value(moments.first) / static_cast<L>(n) : L(0);
    const L variance = value(moments.second) / static_cast<L>(n) - rest * rest;
    // Not max: a NaN has to stay one.
    return {center, rest, 1 / root_of((variance < 0 ? L(0) : variance) + epsilon)};
  }

  ONNXNORM_DEVICE void store(const At& item, std::int64_t k, L v, const Statistics<L>& s) const {
    const At at = entry(item, k);
    L result = ((v - s.center) - s.rest) * s.inverse * widen(scale[at.operand[kOfScale]]);
    if (bias != nullptr) result += widen(bias[at.operand[kOfBias]]);
    // Infinite for a very negative value, and then the quotient is the limit -0.
    if (silu) result = result / (1 + exp_of(-result));
    narrow(result, &y[at.operand[kOfX]]);
  }
};

// Joins the threads of a block, or those of a column.
struct OverBlock {
  template <class P>
  ONNXNORM_DEVICE static P join_all(const P& mine) {
    return over_block(mine);
  }
};
struct OverColumn {
  template <class P>
  ONNXNORM_DEVICE static P join_all(const P& mine) {
    return over_column(mine);
  }
};

// One item by the threads that `Over` joins: entries first, first + step, ... below n are this
// thread's. With kItems > 0 each keeps its at most kItems values; else they are read three times.
template <class Over, int kItems, class T>
ONNXNORM_DEVICE void normalize(const NormOperands<T>& o, const At& item, int first, int step,
                               std::int64_t n) {
  using L = typename LaneOf<T>::Type;
  [[maybe_unused]] L v[kItems > 0 ? kItems : 1];
  if constexpr (kItems > 0) {
    ONNXNORM_UNROLL
    for (int i = 0; i < kItems; ++i) {
      if (first + i * step < n) v[i] = o.load(item, first + i * step);
    }
  }
  const auto each = [&](auto work) {
    if constexpr (kItems > 0) {
      ONNXNORM_UNROLL
      for (int i = 0; i < kItems; ++i) {
        if (first + i * step < n) work(static_cast<std::int64_t>(first + i * step), v[i]);
      }
    } else {
      for (std::int64_t k = first; k < n; k += step) work(k, o.load(item, k));
    }
  };
  L center = 0;
  if (o.centered) {
    Sum<L> sum{0, 0};
    each([&](std::int64_t, L x) { add(sum, x); });
    center = o.center(Over::join_all(sum));
  }
  Moments<L> moments{{0, 0}, {0, 0}};
  each([&](std::int64_t, L x) { add(moments, x - center); });
  const Statistics<L> s = o.statistics(center, Over::join_all(moments));
  each([&](std::int64_t k, L x) { o.store(item, k, x, s); });
}

// An item by a block, for normalized axes that end with the innermost.
template <class T, int kItems>
struct NormBlocks : NormOperands<T> {
  ONNXNORM_DEVICE void operator()() const {
    for (std::int64_t item = block_index(); item < this->count; item += blocks()) {
      normalize<OverBlock, kItems>(*this, locate(this->kept, item), thread_index(), threads(),
                                   this->n);
    }
  }
};

// Neighbouring columns by neighbouring lanes, as in SoftmaxColumns.
template <class T, int kItems>
struct NormColumns : NormOperands<T> {
  ONNXNORM_DEVICE void operator()() const {
    const std::int64_t tiles = (this->count + kWarp - 1) / kWarp;
    for (std::int64_t tile = block_index(); tile < tiles; tile += blocks()) {
      const std::int64_t column = tile * kWarp + thread_index() % kWarp;
      const std::int64_t n = column < this->count ? this->n : 0;  // no return: others wait for us
      normalize<OverColumn, kItems>(*this, locate(this->kept, n == 0 ? 0 : column),
                                    thread_index() / kWarp, threads() / kWarp, n);
    }
  }
};

}  // namespace onnxnorm::device
