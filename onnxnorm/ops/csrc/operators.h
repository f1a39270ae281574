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

// Runs work(0), ..., work(n - 1), in any order and on any threads.
using Parallel = std::function<void(std::size_t n, const std::function<void(std::size_t)>& work)>;

// y = softmax(scale * x + mask) along `axis`, or its logarithm. `y` has the shape
// broadcast(x, mask). A null mask is none.
struct SoftmaxCall {
  Type type;
  Tensor x;
  const Tensor* mask;
  double scale;
  std::int64_t axis;
  bool log;
  void* y;
};

void run(const SoftmaxCall& call, const Parallel& parallel);

// y = (x - mean) / sqrt(variance + epsilon) * scale + bias, mean and variance over `axes`; scale
// and bias broadcast to x. Without `centered` the mean is taken to be zero (RMS norm). A null bias
// is none.
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

}  // namespace onnxnorm
