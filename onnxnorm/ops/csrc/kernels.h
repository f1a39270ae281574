// What the operators ask of the kernels: one table of functions for each instruction set.
//
// kernels.cc is compiled once for each instruction set, with that set's flags, and fills one table.
// An output may stand in the memory of x: a kernel reads a value for the last time before it writes
// what takes its place, and touches no column, row or part but those that it was given.
//
// Only plain structs cross this border. An inline function with external linkage, also one of the
// standard library, would be merged by the linker, and the copy it keeps might use instructions
// that the processor lacks; so neither this header nor kernels.cc uses any.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace onnxnorm {

enum Type : int { kF32, kF16, kBF16, kF64, kTypes };

// A scaled and masked value: scale * x + mask. `x` and `mask` advance by 1 or by 0 along the values
// that one call treats; a null mask is none.
struct Source {
  const void* x;
  const void* mask;
  ptrdiff_t x_step;
  ptrdiff_t mask_step;
  double scale;
};

// A sum of exponentials m * 2^e, and the largest exponent that a term had.
struct Pair {
  double m;
  double e;
  double top;
};

// One row of a softmax over the innermost axis, or a part of one.
struct Row {
  Source in;
  void* y;
  ptrdiff_t n;
  bool log;
  bool cached;  // the row and its output fit the core's own cache
  bool stream;  // the output does not fit the caches: write past them
};

// Elements from one row to the next.
struct RowStep {
  ptrdiff_t x;
  ptrdiff_t mask;
  ptrdiff_t y;
};

// `width` neighbouring columns of a softmax over an outer axis of n entries.
struct Tile {
  Source in;
  ptrdiff_t x_axis;  // elements between two entries of the axis
  ptrdiff_t mask_axis;
  void* y;
  ptrdiff_t y_axis;
  ptrdiff_t n;
  ptrdiff_t width;  // at most kTileWidth
  bool log;
  bool stream;
};

// Columns that one call of a tile kernel treats at most, and the bytes of scratch memory it has on
// its stack.
constexpr ptrdiff_t kTileWidth = 256;
constexpr ptrdiff_t kScratchBytes = 64 * 1024;

struct Softmax {
  // `count` whole rows; the next one starts `step` elements behind.
  void (*rows)(const Row& first, ptrdiff_t count, const RowStep& step);
  // A row in parts: the sum of each part, then its output, given the sum of all.
  Pair (*sum)(const Row& part);
  void (*finish)(const Row& part, const Pair& total);
  // A row that `sum` called special (`is_special`): infinities, NaN, nothing but huge magnitudes.
  void (*special)(const Row& row);
  bool (*is_special)(const Pair& total);
  void (*tile)(const Tile& tile);
};

// y = (x - center - rest) * inverse * scale + bias, for n neighbours. Scale and bias advance by 0
// or by 1. The mean is center + rest, and not known as well by one number of the lane's type.
struct Affine {
  const void* x;
  void* y;
  const void* scale;
  const void* bias;  // null: none
  ptrdiff_t scale_step;
  ptrdiff_t bias_step;
  ptrdiff_t n;
  double center;
  double rest;
  double inverse;  // 1 / sqrt(variance + epsilon)
  bool silu;
  bool stream;  // write past the caches
};

// One entry k of the normalized axes: where its columns stand.
struct Offsets {
  ptrdiff_t x;
  ptrdiff_t scale;
  ptrdiff_t bias;
};

// Walks the entries of the normalized axes in order, as often as wanted.
struct Walk {
  void (*first)(void* self);
  Offsets (*next)(void* self);
  void* self;
  ptrdiff_t entries;
  const Offsets* table;  // the same from `start` on, where the entries are few; or null
  Offsets start;
};

// A walk of at most so many entries has a table.
constexpr ptrdiff_t kTableEntries = 4096;

// Columns that one call of a norm treats at most.
constexpr ptrdiff_t kNormWidth = 512;

struct Columns {
  const void* x;
  void* y;
  const void* scale;
  const void* bias;  // null: none
  ptrdiff_t scale_step;
  ptrdiff_t bias_step;
  ptrdiff_t width;  // at most kNormWidth
  double epsilon;
  bool centered;  // layer norm; else RMS norm
  bool silu;
  bool stream;
};

// Sums over n neighbours of x - center and of its square.
struct Moments {
  double first;
  double second;
};

struct Norm {
  double (*sum)(const void* x, ptrdiff_t n);
  Moments (*moments)(const void* x, ptrdiff_t n, double center);
  void (*affine)(const Affine& affine);
  void (*columns)(const Columns& columns, const Walk& walk);
};

struct Kernels {
  const char* name;
  Softmax softmax[kTypes];
  Norm norm[kTypes];
};

// Each is null where this library was built without it.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace onnxnorm
