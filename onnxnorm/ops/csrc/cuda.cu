// Which kernel for a GPU treats which shape, and in which grid. Compiled by nvcc, or by any other
// compiler over the emulation of device.h.
#include "cuda.h"

#include <algorithm>

#include "device_kernels.h"

namespace onnxnorm::cuda {
namespace {

using namespace device;

constexpr int kThreads = 256;
// Rows of at least this many values are cut into parts, where there are few.
constexpr std::int64_t kSplitRow = 64 * 1024;
constexpr std::int64_t kFewRows = 64;
constexpr std::int64_t kMostParts = 256;
constexpr int kRowItems = 32;    // values that a lane of a warp keeps of a row
constexpr int kColumnItems = 8;  // and a thread of a column
constexpr int kNormItems = 16;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t grid(std::int64_t blocks) { return std::min(blocks, kMostBlocks); }

Space space_of(const std::vector<Dim>& dims) {
  if (dims.size() > static_cast<std::size_t>(kMostDims)) {
    throw Refusal("a tensor of more than " + std::to_string(kMostDims) +
                  " dimensions that do not merge");
  }
  Space space{};
  space.rank = static_cast<int>(dims.size());
  for (std::size_t i = 0; i < dims.size(); ++i) {
    space.size[i] = dims[i].size;
    for (std::size_t k = 0; k < kOperands; ++k) space.stride[i][k] = dims[i].stride[k];
  }
  return space;
}

// The power of two rows of a block, at most `most`, that gives each thread of a column at most
// kItems of n entries, or `most`.
int rows_for(std::int64_t n, std::int64_t items, int most) {
  int rows = 1;
  while (rows < most && rows * items < n) rows *= 2;
  return rows;
}

// -- softmax --------------------------------------------------------------------------------------

template <template <class, int> class Kernel, int kItems, class T>
void launch_columns(const SoftmaxOperands<T>& operands, int rows, Stream stream) {
  launch(Kernel<T, kItems>{operands}, grid(ceil_div(operands.count, kWarp)), rows * kWarp, stream);
}

template <class T>
void split_rows(const SoftmaxOperands<T>& operands, Stream stream) {
  using L = typename LaneOf<T>::Type;
  const std::int64_t parts = std::min(kMostParts, ceil_div(operands.n, kSplitRow / 4));
  const std::int64_t each = ceil_div(operands.n, parts);
  const std::int64_t tasks = operands.count * parts;  // below kFewRows * kMostParts
  auto* sums =
      static_cast<Mass<L>*>(allocate(static_cast<std::size_t>(tasks) * sizeof(Mass<L>), stream));
  try {
    launch(SoftmaxPartSums<T>{operands, sums, parts, each}, grid(tasks), kThreads, stream);
    launch(SoftmaxPartOutputs<T>{operands, sums, parts, each}, grid(tasks), kThreads, stream);
  } catch (...) {
    release(sums, stream);
    throw;
  }
  release(sums, stream);
}

template <class T>
void softmax(const SoftmaxCall& call, const std::vector<Dim>& items, const Dim& axis,
             bool innermost, Stream stream) {
  using L = typename LaneOf<T>::Type;
  SoftmaxOperands<T> operands{};
  operands.x = static_cast<const T*>(call.x.data);
  operands.mask = call.mask == nullptr ? nullptr : static_cast<const T*>(call.mask->data);
  operands.scale = static_cast<const T*>(call.scale_at);
  operands.factor = static_cast<L>(call.scale);
  operands.y = static_cast<T*>(call.y);
  operands.log = call.log;
  operands.items = space_of(items);
  operands.count = product(items);
  operands.n = axis.size;
  std::copy(axis.stride.begin(), axis.stride.end(), operands.step);
  if (!innermost) {
    const int rows = rows_for(operands.n, kColumnItems, 8);
    if (operands.n <= rows * kColumnItems) {
      launch_columns<SoftmaxColumns, kColumnItems>(operands, rows, stream);
    } else {
      launch_columns<SoftmaxColumns, 0>(operands, rows, stream);
    }
  } else if (operands.n <= 4 * kWarp) {
    launch(SoftmaxWarps<T, 4>{operands}, grid(ceil_div(operands.count, kThreads / kWarp)), kThreads,
           stream);
  } else if (operands.n <= kRowItems * kWarp) {
    launch(SoftmaxWarps<T, kRowItems>{operands}, grid(ceil_div(operands.count, kThreads / kWarp)),
           kThreads, stream);
  } else if (operands.n < kSplitRow || operands.count >= kFewRows) {
    launch(SoftmaxBlocks<T>{operands}, grid(operands.count), kThreads, stream);
  } else {
    split_rows(operands, stream);
  }
}

// -- normalization --------------------------------------------------------------------------------

template <class T>
void norm(const NormCall& call, const std::vector<Dim>& kept, const std::vector<Dim>& reduced,
          bool innermost, Stream stream) {
  using L = typename LaneOf<T>::Type;
  NormOperands<T> operands{};
  operands.x = static_cast<const T*>(call.x.data);
  operands.scale = static_cast<const T*>(call.scale.data);
  operands.bias = call.bias == nullptr ? nullptr : static_cast<const T*>(call.bias->data);
  operands.y = static_cast<T*>(call.y);
  operands.kept = space_of(kept);
  operands.reduced = space_of(reduced);
  operands.count = product(kept);
  operands.n = product(reduced);
  operands.epsilon = static_cast<L>(call.epsilon);
  operands.centered = call.centered;
  operands.silu = call.silu;
  const int rows = rows_for(operands.n, kNormItems, innermost ? 8 : 16);
  const int block =
      innermost ? rows_for(operands.n, kWarp * 4, kThreads / kWarp) * kWarp : rows * kWarp;
  if (innermost) {
    const std::int64_t blocks = grid(operands.count);
    if (operands.n <= block * kNormItems) {
      launch(NormBlocks<T, kNormItems>{operands}, blocks, block, stream);
    } else {
      launch(NormBlocks<T, 0>{operands}, blocks, block, stream);
    }
  } else {
    const std::int64_t blocks = grid(ceil_div(operands.count, kWarp));
    if (operands.n <= rows * kNormItems) {
      launch(NormColumns<T, kNormItems>{operands}, blocks, block, stream);
    } else {
      launch(NormColumns<T, 0>{operands}, blocks, block, stream);
    }
  }
}

/// Calls `work` with a value of the type that `type` names.
template <class Work>
void for_type(Type type, const Work& work) {
  switch (type) {
    case kF32:
      return work(float{});
    case kF16:
      return work(F16{});
    case kBF16:
      return work(BF16{});
    case kF64:
      return work(double{});
    case kTypes:
      break;
  }
}

}  // namespace

void run(const SoftmaxCall& call, void* raw_stream) {
  const auto layout = layout_of(call);
  if (layout.elements == 0) return;
  const auto stream = static_cast<Stream>(raw_stream);
  for_type(call.type, [&](auto type) {
    softmax<decltype(type)>(call, layout.items, layout.axis, layout.innermost, stream);
  });
}

void run(const NormCall& call, void* raw_stream) {
  const auto layout = layout_of(call);
  if (layout.elements == 0) return;
  const auto stream = static_cast<Stream>(raw_stream);
  for_type(call.type, [&](auto type) {
    norm<decltype(type)>(call, layout.kept, layout.reduced, layout.innermost, stream);
  });
}

}  // namespace onnxnorm::cuda
