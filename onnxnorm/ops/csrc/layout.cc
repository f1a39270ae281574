#include "layout.h"

#include <limits>

namespace onnxnorm {

namespace {
constexpr std::int64_t kWidestElement = 8;
}

std::string spell(const Shape& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

std::int64_t count(const Shape& shape) {
  // A size of zero anywhere makes the product zero, whatever overflow the other sizes would cause.
  bool empty = false;
  for (const std::int64_t size : shape) {
    if (size < 0) throw Refusal("the shape " + spell(shape) + " has a negative size");
    empty = empty || size == 0;
  }
  if (empty) return 0;
  std::int64_t elements = 1;
  for (const std::int64_t size : shape) {
    if (__builtin_mul_overflow(elements, size, &elements)) elements = -1;
    if (elements < 0 || elements > std::numeric_limits<std::ptrdiff_t>::max() / kWidestElement) {
      throw Refusal("a tensor of shape " + spell(shape) + " is larger than memory can be");
    }
  }
  return elements;
}

Shape broadcast(const Shape& a, const Shape& b) {
  const Shape& longer = a.size() >= b.size() ? a : b;
  const Shape& shorter = a.size() >= b.size() ? b : a;
  Shape out = longer;
  const std::size_t shift = longer.size() - shorter.size();
  for (std::size_t i = 0; i < shorter.size(); ++i) {
    std::int64_t& size = out[shift + i];
    if (size == 1) {
      size = shorter[i];
    } else if (shorter[i] != 1 && shorter[i] != size) {
      throw Refusal("the shapes " + spell(a) + " and " + spell(b) + " do not broadcast");
    }
  }
  return out;
}

std::size_t resolve_axis(std::int64_t axis, std::size_t rank) {
  const auto signed_rank = static_cast<std::int64_t>(rank);
  if (axis < -signed_rank || axis >= signed_rank) {
    throw Refusal("axis " + std::to_string(axis) + " is outside a tensor of rank " +
                  std::to_string(rank));
  }
  return static_cast<std::size_t>(axis < 0 ? axis + signed_rank : axis);
}

void add_strides(std::vector<Dim>& dims, std::size_t at, const Shape& operand, const Shape& shape,
                 const char* name) {
  const auto refuse = [&] {
    throw Refusal(std::string(name) + " of shape " + spell(operand) + " does not broadcast to " +
                  spell(shape));
  };
  if (operand.size() > shape.size()) refuse();
  const std::size_t shift = shape.size() - operand.size();
  std::int64_t stride = 1;
  for (std::size_t i = operand.size(); i-- > 0;) {
    if (operand[i] != shape[shift + i] && operand[i] != 1) refuse();
    dims[shift + i].stride[at] = operand[i] == 1 ? 0 : stride;
    // Overflows only where another size is 0: tensors of that many elements are refused.
    if (__builtin_mul_overflow(stride, operand[i], &stride)) stride = 0;
  }
}

std::vector<Dim> merged(const std::vector<Dim>& dims, std::size_t operands) {
  std::vector<Dim> out;
  for (const Dim& dim : dims) {
    if (dim.size == 1) continue;
    bool joins = !out.empty() && out.back().axis == dim.axis;
    for (std::size_t k = 0; joins && k < operands; ++k) {
      joins = out.back().stride[k] == dim.stride[k] * dim.size;
    }
    if (joins) {
      out.back().size *= dim.size;
      out.back().stride = dim.stride;
    } else {
      out.push_back(dim);
    }
  }
  return out;
}

std::array<std::int64_t, kOperands> offsets(const std::vector<Dim>& dims, std::int64_t index) {
  std::array<std::int64_t, kOperands> out{};
  for (std::size_t i = dims.size(); i-- > 0;) {
    const Dim& dim = dims[i];
    const std::int64_t outer = i == 0 ? 0 : index / dim.size;
    const std::int64_t at = index - outer * dim.size;
    for (std::size_t k = 0; k < kOperands; ++k) out[k] += at * dim.stride[k];
    index = outer;
  }
  return out;
}

std::int64_t product(const std::vector<Dim>& dims) {
  std::int64_t size = 1;
  for (const Dim& dim : dims) size *= dim.size;
  return size;
}

}  // namespace onnxnorm
