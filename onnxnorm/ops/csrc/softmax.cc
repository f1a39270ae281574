// Softmax and LogSoftmax: which kernel treats which part, and in which pieces for the threads.
#include <algorithm>
#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "dispatch.h"
#include "operators.h"

namespace onnxnorm {
namespace {

// Elements that are worth a task of their own.
constexpr std::int64_t kGrain = 32 * 1024;
// Rows of at least this many elements are split over threads, where there are few rows.
constexpr std::int64_t kSplitRow = 256 * 1024;
constexpr std::int64_t kFewRows = 16;
constexpr std::int64_t kMostParts = 64;
// An output of this many bytes does not fit the caches of one core, so it is written past them. One
// that stands in its input's place was just read, and leaves the caches by itself.
constexpr std::int64_t kStreamBytes = 8 * 1024 * 1024;

constexpr std::size_t kX = 0, kMask = 1, kY = 2;

// The cache of one core: its second level.
std::int64_t private_cache() {
  constexpr std::int64_t kUnknown = 512 * 1024;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const std::int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return size > 0 ? size : kUnknown;
#else
  return kUnknown;
#endif
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Plan {
  const Softmax* kernels;
  SoftmaxCall call;
  std::vector<Dim> outer;  // every dimension but those below
  Dim axis;
  Dim inner;  // only for tiles
  bool cached;
  bool stream;

  const char* at(const void* data, std::int64_t offset) const {
    return static_cast<const char*>(data) + offset * kBytes[call.type];
  }
  void* out(std::int64_t offset) const { return const_cast<char*>(at(call.y, offset)); }

  Source source(const std::array<std::int64_t, kOperands>& offset, const Dim& along) const {
    return {at(call.x.data, offset[kX]),
            call.mask == nullptr ? nullptr : at(call.mask->data, offset[kMask]),
            static_cast<std::ptrdiff_t>(along.stride[kX]),
            static_cast<std::ptrdiff_t>(along.stride[kMask]), call.scale};
  }

  Row row(std::int64_t index) const {
    const auto offset = offsets(outer, index);
    return {source(offset, axis),
            out(offset[kY]),
            static_cast<std::ptrdiff_t>(axis.size),
            call.log,
            cached,
            stream};
  }

  Row part(std::int64_t index, std::int64_t from, std::int64_t n) const {
    Row part = row(index);
    auto offset = offsets(outer, index);
    for (std::size_t k = 0; k < kOperands; ++k) offset[k] += from * axis.stride[k];
    part.in = source(offset, axis);
    part.y = out(offset[kY]);
    part.n = static_cast<std::ptrdiff_t>(n);
    return part;
  }

  Tile tile(std::int64_t index, std::int64_t column, std::int64_t width) const {
    auto offset = offsets(outer, index);
    for (std::size_t k = 0; k < kOperands; ++k) offset[k] += column * inner.stride[k];
    return {source(offset, inner),
            static_cast<std::ptrdiff_t>(axis.stride[kX]),
            static_cast<std::ptrdiff_t>(axis.stride[kMask]),
            out(offset[kY]),
            static_cast<std::ptrdiff_t>(axis.stride[kY]),
            static_cast<std::ptrdiff_t>(axis.size),
            static_cast<std::ptrdiff_t>(width),
            call.log,
            stream};
  }
};

void run_rows(const Plan& plan, const Parallel& parallel) {
  const std::int64_t rows = product(plan.outer);
  const std::int64_t n = plan.axis.size;
  if (n < kSplitRow || rows >= kFewRows) {
    const std::int64_t each = std::max<std::int64_t>(1, kGrain / n);
    parallel(static_cast<std::size_t>(ceil_div(rows, each)), [&](std::size_t task) {
      const std::int64_t first = static_cast<std::int64_t>(task) * each;
      const std::int64_t last = std::min(rows, first + each);
      // Runs of rows that lie one step apart: where each begins takes divisions to find.
      const Dim inner = plan.outer.empty() ? Dim{1, {}, false} : plan.outer.back();
      const RowStep step{static_cast<std::ptrdiff_t>(inner.stride[kX]),
                         static_cast<std::ptrdiff_t>(inner.stride[kMask]),
                         static_cast<std::ptrdiff_t>(inner.stride[kY])};
      for (std::int64_t r = first; r < last;) {
        const std::int64_t run = std::min(last - r, inner.size - r % inner.size);
        plan.kernels->rows(plan.row(r), static_cast<std::ptrdiff_t>(run), step);
        r += run;
      }
    });
    return;
  }
  // The parts depend on the shape only, so the result does not depend on the number of threads.
  const std::int64_t parts = std::min(kMostParts, ceil_div(n, kSplitRow / 4));
  const std::int64_t each = ceil_div(n, parts);
  const auto piece = [&](std::size_t task) {
    const auto index = static_cast<std::int64_t>(task);
    const std::int64_t from = index % parts * each;
    return plan.part(index / parts, std::min(n, from),
                     std::max<std::int64_t>(0, std::min(each, n - from)));
  };
  const auto tasks = static_cast<std::size_t>(rows * parts);  // at most kFewRows * kMostParts
  std::vector<Pair> sums(tasks);
  parallel(tasks, [&](std::size_t task) { sums[task] = plan.kernels->sum(piece(task)); });
  std::vector<Pair> totals(static_cast<std::size_t>(rows));
  std::vector<char> special(static_cast<std::size_t>(rows));
  for (std::size_t r = 0; r < totals.size(); ++r) {
    const auto first = sums.begin() + static_cast<std::ptrdiff_t>(r) * parts;
    Pair total = *first;
    for (auto next = first + 1; next != first + parts; ++next) {
      const double e = std::max(total.e, next->e);
      total.m = __builtin_ldexp(total.m, static_cast<int>(total.e - e)) +
                __builtin_ldexp(next->m, static_cast<int>(next->e - e));
      total.e = e;
      total.top = std::max(total.top, next->top);
    }
    totals[r] = total;
    special[r] = plan.kernels->is_special(total);
  }
  parallel(tasks, [&](std::size_t task) {
    const std::size_t r = task / static_cast<std::size_t>(parts);
    if (!special[r]) {
      plan.kernels->finish(piece(task), totals[r]);
    } else if (task % static_cast<std::size_t>(parts) == 0) {
      plan.kernels->special(plan.row(static_cast<std::int64_t>(r)));
    }
  });
}

void run_tiles(const Plan& plan, const Parallel& parallel) {
  const std::int64_t columns = plan.inner.size;
  const std::int64_t lane = plan.call.type == kF64 ? 8 : 4;
  // A tile that fits the scratch memory reads its input once. Narrower than 16 columns it would use
  // too little of each cache line.
  const std::int64_t fits = kScratchBytes / lane / plan.axis.size / 16 * 16;
  const std::int64_t width = fits < 16 ? kTileWidth : std::min<std::int64_t>(fits, kTileWidth);
  const std::int64_t blocks = ceil_div(columns, width);
  const std::int64_t tiles = product(plan.outer) * blocks;
  const std::int64_t each =
      std::max<std::int64_t>(1, kGrain / (plan.axis.size * std::min(width, columns)));
  parallel(static_cast<std::size_t>(ceil_div(tiles, each)), [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) * each;
    for (std::int64_t t = first; t < std::min(tiles, first + each); ++t) {
      const std::int64_t column = t % blocks * width;
      plan.kernels->tile(plan.tile(t / blocks, column, std::min(width, columns - column)));
    }
  });
}

}  // namespace

SoftmaxLayout layout_of(const SoftmaxCall& call) {
  const Shape shape =
      call.mask == nullptr ? call.x.shape : broadcast(call.x.shape, call.mask->shape);
  const std::size_t axis = resolve_axis(call.axis, shape.size());
  SoftmaxLayout layout{count(shape), {}, Dim{1, {}, true}, false};
  if (layout.elements == 0) return layout;

  std::vector<Dim> dims(shape.size());
  for (std::size_t i = 0; i < dims.size(); ++i) dims[i] = {shape[i], {}, i == axis};
  add_strides(dims, kX, call.x.shape, shape, "X");
  if (call.mask != nullptr) add_strides(dims, kMask, call.mask->shape, shape, "mask");
  add_strides(dims, kY, shape, shape, "Y");

  dims = merged(dims, kOperands);
  const auto found =
      std::find_if(dims.begin(), dims.end(), [](const Dim& dim) { return dim.axis; });
  // An axis of size 1 was dropped: every row is one element, and all columns are neighbours.
  if (found != dims.end()) {
    layout.axis = *found;
    layout.innermost = found + 1 == dims.end();
    dims.erase(found);
  }
  layout.items = std::move(dims);
  return layout;
}

void run(const SoftmaxCall& call, const Parallel& parallel) {
  SoftmaxLayout layout = layout_of(call);
  if (layout.elements == 0) return;
  Plan plan{};
  plan.kernels = &kernels().softmax[call.type];
  plan.call = call;
  plan.axis = layout.axis;
  plan.outer = std::move(layout.items);
  // A row that fits with its output is read three times in cache, where one exponential an element
  // is cheaper than two; a longer one is read twice.
  plan.cached = 2 * layout.axis.size * kBytes[call.type] <= private_cache();
  plan.stream = layout.elements * kBytes[call.type] >= kStreamBytes && call.y != call.x.data;
  if (layout.innermost) {
    run_rows(plan, parallel);
    return;
  }
  plan.inner = plan.outer.empty() ? Dim{1, {}, false} : plan.outer.back();
  if (!plan.outer.empty()) plan.outer.pop_back();
  run_tiles(plan, parallel);
}

}  // namespace onnxnorm
