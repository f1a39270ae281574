// Layer, RMS and group norm: which kernel treats which part, and in which pieces for the threads.
#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "operators.h"

namespace onnxnorm {
namespace {

constexpr std::int64_t kGrain = 32 * 1024;  // elements that are worth a task of their own
constexpr std::int64_t kTile = 128 * 1024;  // elements that are read twice
// The same as in softmax.cc. From here on it pays, what reads the output next included.
constexpr std::int64_t kStreamBytes = 24 * 1024 * 1024;
constexpr std::size_t kX = 0, kScale = 1, kBias = 2;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

using Offset = std::array<std::int64_t, kOperands>;

// Steps through the space that some dimensions span, last fastest, without dividing.
class Odometer {
 public:
  explicit Odometer(const std::vector<Dim>& dims) : dims_(dims), at_(dims.size()) {}

  // Goes on from the first position, where the operands stand at `start`.
  void start(const Offset& start) {
    std::fill(at_.begin(), at_.end(), 0);
    start_ = offset_ = start;
  }
  void first() { start(start_); }

  Offset next() {
    const Offset now = offset_;
    for (std::size_t i = dims_.size(); i-- > 0;) {
      const Dim& dim = dims_[i];
      for (std::size_t k = 0; k < kOperands; ++k) offset_[k] += dim.stride[k];
      if (++at_[i] < dim.size) break;
      for (std::size_t k = 0; k < kOperands; ++k) offset_[k] -= dim.stride[k] * dim.size;
      at_[i] = 0;
    }
    return now;
  }

 private:
  const std::vector<Dim>& dims_;
  std::vector<std::int64_t> at_;
  Offset start_{};
  Offset offset_{};
};

std::vector<Dim> select(const std::vector<Dim>& dims, bool axis) {
  std::vector<Dim> out;
  for (const Dim& dim : dims) {
    if (dim.axis == axis) out.push_back(dim);
  }
  return out;
}

struct Plan {
  const Norm* kernels;
  const NormCall& call;
  std::vector<Dim> kept;
  std::vector<Dim> reduced;
  bool stream;

  const char* at(const void* data, std::int64_t offset) const {
    return static_cast<const char*>(data) + offset * kBytes[call.type];
  }
  const void* bias(std::int64_t offset) const {
    return call.bias == nullptr ? nullptr : at(call.bias->data, offset);
  }
};

// The innermost dimension is normalized: every item is a set of contiguous segments.
void run_segments(Plan plan, std::vector<Dim> whole, const Parallel& parallel) {
  const NormCall& call = plan.call;
  const Dim segment = plan.reduced.back();
  plan.reduced.pop_back();
  // Scale and bias cut segments short that are one for x, and the statistics ask for x only.
  const Dim long_segment = whole.back();
  whole.pop_back();
  const std::int64_t items = product(plan.kept);
  const std::int64_t segments = product(plan.reduced);
  const std::int64_t long_segments = product(whole);
  const std::int64_t n = segments * segment.size;
  const std::int64_t each = std::max<std::int64_t>(1, kGrain / n);
  parallel(static_cast<std::size_t>(ceil_div(items, each)), [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) * each;
    Odometer long_walk(whole);
    Odometer walk(plan.reduced);
    for (std::int64_t item = first; item < std::min(items, first + each); ++item) {
      const Offset start = offsets(plan.kept, item);
      long_walk.start(start);
      const auto length = static_cast<std::ptrdiff_t>(long_segment.size);
      double center = 0;
      if (call.centered) {
        for (std::int64_t s = 0; s < long_segments; ++s) {
          center += plan.kernels->sum(plan.at(call.x.data, long_walk.next()[kX]), length);
        }
        center = static_cast<double>(static_cast<float>(center / static_cast<double>(n)));
        long_walk.first();
      }
      Moments moments{0, 0};
      for (std::int64_t s = 0; s < long_segments; ++s) {
        const Moments more =
            plan.kernels->moments(plan.at(call.x.data, long_walk.next()[kX]), length, center);
        moments.first += more.first;
        moments.second += more.second;
      }
      const double rest = call.centered ? moments.first / static_cast<double>(n) : 0;
      const double variance = moments.second / static_cast<double>(n) - rest * rest;
      // Not std::max: a NaN has to stay one.
      const double inverse = 1 / std::sqrt((variance < 0 ? 0 : variance) + call.epsilon);
      walk.start(start);
      for (std::int64_t s = 0; s < segments; ++s) {
        const Offset offset = walk.next();
        const char* x = plan.at(call.x.data, offset[kX]);
        plan.kernels->affine({x, const_cast<char*>(plan.at(call.y, offset[kX])),
                              plan.at(call.scale.data, offset[kScale]), plan.bias(offset[kBias]),
                              static_cast<std::ptrdiff_t>(segment.stride[kScale]),
                              static_cast<std::ptrdiff_t>(segment.stride[kBias]),
                              static_cast<std::ptrdiff_t>(segment.size), center, rest, inverse,
                              call.silu, plan.stream});
      }
    }
  });
}

// The innermost dimension is kept: neighbouring columns are normalized side by side.
void run_columns(Plan plan, const Parallel& parallel) {
  const NormCall& call = plan.call;
  const Dim inner = plan.kept.empty() ? Dim{1, {}, false} : plan.kept.back();
  if (!plan.kept.empty()) plan.kept.pop_back();
  const std::int64_t n = product(plan.reduced);
  // Whole cache lines, and tiles of one size.
  const std::int64_t most = std::clamp<std::int64_t>(kTile / n / 64 * 64, 64, kNormWidth);
  const std::int64_t width = ceil_div(ceil_div(inner.size, ceil_div(inner.size, most)), 64) * 64;
  const std::int64_t blocks = ceil_div(inner.size, width);
  const std::int64_t items = product(plan.kept) * blocks;
  const std::int64_t each = std::max<std::int64_t>(1, kGrain / (n * std::min(width, inner.size)));
  const auto as_offsets = [](const Offset& offset) {
    return Offsets{static_cast<std::ptrdiff_t>(offset[kX]),
                   static_cast<std::ptrdiff_t>(offset[kScale]),
                   static_cast<std::ptrdiff_t>(offset[kBias])};
  };
  // Every tile walks the same way from its own start, so few steps are taken once for all.
  std::vector<Offsets> table(n <= kTableEntries ? static_cast<std::size_t>(n) : 0);
  Odometer origin(plan.reduced);
  for (Offsets& entry : table) entry = as_offsets(origin.next());
  parallel(static_cast<std::size_t>(ceil_div(items, each)), [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) * each;
    Odometer odometer(plan.reduced);
    for (std::int64_t item = first; item < std::min(items, first + each); ++item) {
      const std::int64_t column = item % blocks * width;
      Offset start = offsets(plan.kept, item / blocks);
      for (std::size_t k = 0; k < kOperands; ++k) start[k] += column * inner.stride[k];
      odometer.start(start);
      const Walk walk{[](void* self) { static_cast<Odometer*>(self)->first(); },
                      [](void* self) {
                        const Offset now = static_cast<Odometer*>(self)->next();
                        return Offsets{static_cast<std::ptrdiff_t>(now[kX]),
                                       static_cast<std::ptrdiff_t>(now[kScale]),
                                       static_cast<std::ptrdiff_t>(now[kBias])};
                      },
                      &odometer,
                      static_cast<std::ptrdiff_t>(n),
                      table.empty() ? nullptr : table.data(),
                      as_offsets(start)};
      plan.kernels->columns({call.x.data, call.y, call.scale.data, plan.bias(0),
                             static_cast<std::ptrdiff_t>(inner.stride[kScale]),
                             static_cast<std::ptrdiff_t>(inner.stride[kBias]),
                             static_cast<std::ptrdiff_t>(std::min(width, inner.size - column)),
                             call.epsilon, call.centered, call.silu, plan.stream},
                            walk);
    }
  });
}

}  // namespace

NormLayout layout_of(const NormCall& call) {
  const Shape& shape = call.x.shape;
  std::vector<Dim> dims(shape.size());
  for (std::size_t i = 0; i < dims.size(); ++i) dims[i] = {shape[i], {}, false};
  for (const std::int64_t axis : call.axes) {
    Dim& dim = dims[resolve_axis(axis, shape.size())];
    if (dim.axis) throw Refusal("axis " + std::to_string(axis) + " is named twice");
    dim.axis = true;
  }
  const std::int64_t elements = count(shape);
  add_strides(dims, kX, shape, shape, "X");
  add_strides(dims, kScale, call.scale.shape, shape, "scale");
  if (call.bias != nullptr) add_strides(dims, kBias, call.bias->shape, shape, "bias");
  if (elements == 0) return {0, {}, {}, {}, false};
  const std::vector<Dim> all = merged(dims, kOperands);
  return {elements, select(all, false), select(all, true), select(merged(dims, 1), true),
          !all.empty() && all.back().axis};
}

void run(const NormCall& call, const Parallel& parallel) {
  NormLayout layout = layout_of(call);
  if (layout.elements == 0) return;
  Plan plan{&kernels().norm[call.type], call, std::move(layout.kept), std::move(layout.reduced),
            layout.elements * kBytes[call.type] >= kStreamBytes && call.y != call.x.data};
  if (layout.innermost) {
    run_segments(std::move(plan), std::move(layout.reduced_of_x), parallel);
  } else {
    run_columns(std::move(plan), parallel);
  }
}

}  // namespace onnxnorm
