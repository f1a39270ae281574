// The operators on tensors in memory, apart from onnxruntime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"
#include "layout.h"

namespace onnxnorm {

struct Tensor {
  const void* data;
  Shape shape;
};

constexpr std::int64_t kBytes[kTypes] = {4, 2, 2, 8};  // of an element

// Runs work(0), ..., work(n - 1), in any order and on any threads.
using Parallel = std::function<void(std::size_t n, const std::function<void(std::size_t)>& work)>;

// y = softmax(scale * x + mask) along `axis`, or its logarithm. `y` has the shape
// broadcast(x, mask), and may be `x` where that is the same. A null mask is none.
struct SoftmaxCall {
  Type type;
  Tensor x;
  const Tensor* mask;
  double scale;
  std::int64_t axis;
  bool log;
  void* y;
  const void* scale_at = nullptr;  // where a GPU finds the scale, of `type`; null: `scale`
};

void run(const SoftmaxCall& call, const Parallel& parallel);

// What a softmax call comes to in memory, with neighbouring dimensions merged.
struct SoftmaxLayout {
  std::int64_t elements;   // of y
  std::vector<Dim> items;  // all but the axis; operands: x, mask, y
  Dim axis;
  bool innermost;  // is it the axis that is innermost?
};

// Throws Refusal where the shapes do not fit each other.
SoftmaxLayout layout_of(const SoftmaxCall& call);

// y = (x - mean) / sqrt(variance + epsilon) * scale + bias, mean and variance over `axes`; scale
// and bias broadcast to x. Without `centered` the mean is taken to be zero (RMS norm). A null bias
// is none. `y` may be `x`.
struct NormCall {
  Type type;
  Tensor x;
  Tensor scale;
  const Tensor* bias;
  std::vector<std::int64_t> axes;
  double epsilon;
  bool centered;
  bool silu;
  void* y;
};

void run(const NormCall& call, const Parallel& parallel);

// The same of a norm: what is kept and what is normalized; operands: x, scale, bias.
struct NormLayout {
  std::int64_t elements;
  std::vector<Dim> kept;
  std::vector<Dim> reduced;
  std::vector<Dim> reduced_of_x;  // merged without regard to scale and bias
  bool innermost;                 // is the innermost dimension normalized?
};

// Throws Refusal where the shapes do not fit each other.
NormLayout layout_of(const NormCall& call);

// Where operators run.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual void run(const SoftmaxCall& call) const = 0;
  virtual void run(const NormCall& call) const = 0;
  // Can the CPU not read what the tensors point to?
  virtual bool is_device() const = 0;
};

}  // namespace onnxnorm
