// How tensors lie in memory: broadcast strides, neighbouring dimensions merged, sizes checked.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace onnxnorm {

// What a model or its inputs can cause; the text reaches the user through onnxruntime.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Shape = std::vector<std::int64_t>;

std::string spell(const Shape& shape);

// The number of elements. Throws Refusal where a size is negative, or where the tensor would have
// more bytes than a pointer can span.
std::int64_t count(const Shape& shape);

// ONNX's multidirectional broadcast of two shapes. Throws Refusal where they do not broadcast.
Shape broadcast(const Shape& a, const Shape& b);

// A negative axis counts from the end. Throws Refusal where it is outside the rank.
std::size_t resolve_axis(std::int64_t axis, std::size_t rank);

constexpr std::size_t kOperands = 3;

// One dimension of the index space: its size, and for each operand the elements between two steps
// along it (0 where the operand is broadcast).
struct Dim {
  std::int64_t size;
  std::array<std::int64_t, kOperands> stride;
  bool axis;  // is it one of the operator's axes?
};

// The strides of `operand`, broadcast to `shape`, written to position `at` of each dimension.
// Throws Refusal, naming it, where it does not broadcast to that shape.
void add_strides(std::vector<Dim>& dims, std::size_t at, const Shape& operand, const Shape& shape,
                 const char* name);

// Drops dimensions of size 1, and merges neighbours (both axes, or neither) that the first
// `operands` operands cross with one stride.
std::vector<Dim> merged(const std::vector<Dim>& dims, std::size_t operands);

// The offset of every operand at position `index` of the space that `dims` span, last fastest.
std::array<std::int64_t, kOperands> offsets(const std::vector<Dim>& dims, std::int64_t index);

std::int64_t product(const std::vector<Dim>& dims);

}  // namespace onnxnorm
