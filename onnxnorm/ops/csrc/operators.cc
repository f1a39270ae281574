// The table of operators. A new one is a row here, a row in ../bodies.py, and its kernel.
#include "runtime.h"

namespace onnxnorm {
namespace {

Shape first_shape(const Attributes&, const std::vector<Tensor>& inputs) { return inputs[0].shape; }

// -- softmax --------------------------------------------------------------------------------------

Attributes read_softmax(const AttributeReader& reader, Type) {
  Attributes attributes;
  attributes.axis = reader.integer("axis", -1);
  return attributes;
}

template <bool log>
void softmax(const Invocation& it, const Engine& engine) {
  engine.run(SoftmaxCall{it.type, it.inputs[0], nullptr, 1, it.attributes.axis, log, it.output});
}

double scalar(Type type, const Tensor& tensor) {
  if (type == kF64) return *static_cast<const double*>(tensor.data);
  if (type == kF32) return static_cast<double>(*static_cast<const float*>(tensor.data));
  const std::uint16_t bits = *static_cast<const std::uint16_t*>(tensor.data);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  const int exponent_bits = type == kF16 ? 5 : 8;
  const int mantissa_bits = 15 - exponent_bits;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? __builtin_nan("") : sign * __builtin_inf();
  }
  const int leading = exponent == 0 ? 0 : 1 << mantissa_bits;
  return sign *
         __builtin_ldexp(leading + mantissa, (exponent == 0 ? 1 : exponent) - bias - mantissa_bits);
}

Shape masked_shape(const Attributes&, const std::vector<Tensor>& inputs) {
  return broadcast(inputs[0].shape, inputs[2].shape);
}

template <bool log>
void masked_softmax(const Invocation& it, const Engine& engine) {
  const Tensor& scale = it.inputs[1];
  if (scale.shape.size() > 1 || count(scale.shape) != 1) {
    throw Refusal("scale has the shape " + spell(scale.shape) + " and has to be one number");
  }
  const bool device = engine.is_device();
  engine.run(SoftmaxCall{it.type, it.inputs[0], &it.inputs[2], device ? 1 : scalar(it.type, scale),
                         it.attributes.axis, log, it.output, device ? scale.data : nullptr});
}

// -- normalization --------------------------------------------------------------------------------

// The body computes in the type that stash_type names, and so does the kernel.
void check_stash_type(const AttributeReader& reader, Type type) {
  const std::int64_t expected = type == kF64 ? ort::kDouble : ort::kFloat;
  const std::int64_t given = reader.integer("stash_type", ort::kFloat);
  if (given != expected) {
    throw Refusal("stash_type is " + std::to_string(given) + "; for this type of X it has to be " +
                  std::to_string(expected));
  }
}

Attributes read_axes(const AttributeReader& reader, Type type) {
  check_stash_type(reader, type);
  Attributes attributes;
  attributes.axes = reader.integers("axes");
  attributes.epsilon = reader.real("epsilon", 1e-5f);
  return attributes;
}

void channel_layer_norm(const Invocation& it, const Engine& engine) {
  engine.run(NormCall{it.type, it.inputs[0], it.inputs[1], &it.inputs[2], it.attributes.axes,
                      it.attributes.epsilon, true, false, it.output});
}

void channel_rms_norm(const Invocation& it, const Engine& engine) {
  engine.run(NormCall{it.type, it.inputs[0], it.inputs[1], nullptr, it.attributes.axes,
                      it.attributes.epsilon, false, false, it.output});
}

Attributes read_groups(const AttributeReader& reader, Type type) {
  check_stash_type(reader, type);
  Attributes attributes;
  attributes.groups = reader.integer("num_groups", 0);
  attributes.epsilon = reader.real("epsilon", 1e-5f);
  if (attributes.groups < 1) {
    throw Refusal("num_groups is " + std::to_string(attributes.groups) +
                  "; it has to be given, and positive");
  }
  return attributes;
}

// A group norm is a layer norm over axes 2 and 3 of [N, groups, C / groups, the rest].
template <bool silu>
void group_norm(const Invocation& it, const Engine& engine) {
  const Shape& shape = it.inputs[0].shape;
  const std::int64_t groups = it.attributes.groups;
  if (shape.size() < 2 || shape[1] % groups != 0) {
    throw Refusal("X of shape " + spell(shape) + " has no " + std::to_string(groups) +
                  " equal groups of channels along axis 1");
  }
  count(shape);
  std::int64_t rest = 1;
  bool empty = false;
  for (std::size_t i = 2; i < shape.size(); ++i) empty = empty || shape[i] == 0;
  for (std::size_t i = 2; i < shape.size() && !empty; ++i) rest *= shape[i];
  const std::int64_t width = shape[1] / groups;
  const auto per_channel = [&](const Tensor& tensor, const char* name) {
    if (tensor.shape != Shape{shape[1]}) {
      throw Refusal(std::string(name) + " has the shape " + spell(tensor.shape) + " and not " +
                    spell({shape[1]}));
    }
    return Tensor{tensor.data, {groups, width, 1}};
  };
  const Tensor bias = per_channel(it.inputs[2], "bias");
  engine.run(NormCall{it.type,
                      {it.inputs[0].data, {shape[0], groups, width, empty ? 0 : rest}},
                      per_channel(it.inputs[1], "scale"),
                      &bias,
                      {2, 3},
                      it.attributes.epsilon,
                      true,
                      silu,
                      it.output});
}

}  // namespace

const std::vector<Operator>& operators() {
  // Never destroyed: library.cc says why.
  static const auto& table = *new std::vector<Operator>{
      {"TwoPassSoftmax", 1, read_softmax, first_shape, softmax<false>, true},
      {"TwoPassLogSoftmax", 1, read_softmax, first_shape, softmax<true>, true},
      {"TwoPassMaskedSoftmax", 3, read_softmax, masked_shape, masked_softmax<false>, false},
      {"TwoPassMaskedLogSoftmax", 3, read_softmax, masked_shape, masked_softmax<true>, false},
      {"ChannelLayerNormalization", 3, read_axes, first_shape, channel_layer_norm, true},
      {"ChannelRMSNormalization", 2, read_axes, first_shape, channel_rms_norm, true},
      {"GroupNormalization", 3, read_groups, first_shape, group_norm<false>, true},
      {"GroupNormalizationSilu", 3, read_groups, first_shape, group_norm<true>, true},
  };
  return table;
}

}  // namespace onnxnorm
