// onnxruntime's objects with owners, its errors as exceptions, and the operators' table.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "operators.h"
#include "ort_abi.h"

namespace onnxnorm {

// An error that onnxruntime returned, to be handed back as it is.
struct StatusError {
  ort::Status* status;
};

inline void check(ort::Status* status) {
  if (status != nullptr) throw StatusError{status};
}

struct ReleaseInfo {
  const ort::Api* api;
  void operator()(ort::TensorInfo* info) const { api->ReleaseTensorTypeAndShapeInfo(info); }
};
using Info = std::unique_ptr<ort::TensorInfo, ReleaseInfo>;

// The attributes of a node, read once when its kernel is made.
struct Attributes {
  std::int64_t axis = -1;
  std::vector<std::int64_t> axes;
  double epsilon = 0;
  std::int64_t groups = 0;
};

class AttributeReader {
 public:
  AttributeReader(const ort::Api* api, const ort::KernelInfo* info) : api_(api), info_(info) {}
  std::int64_t integer(const char* name, std::int64_t otherwise) const;
  double real(const char* name, double otherwise) const;
  std::vector<std::int64_t> integers(const char* name) const;

 private:
  bool found(ort::Status* status) const;
  const ort::Api* api_;
  const ort::KernelInfo* info_;
};

struct Invocation {
  Type type;
  const Attributes& attributes;
  std::vector<Tensor> inputs;
  void* output;
};

// One row for each operator.
struct Operator {
  const char* name;
  std::size_t inputs;
  Attributes (*read)(const AttributeReader& reader, Type type);
  // The output's shape, given those of the inputs.
  Shape (*shape)(const Attributes& attributes, const std::vector<Tensor>& inputs);
  // The output may have the memory of the first input, where both have one shape: every value is
  // read for the last time, by whatever thread, before what takes its place is written.
  void (*compute)(const Invocation& invocation, const Engine& engine);
  // Does the output take its shape from the first input alone? Else all inputs but the second, a
  // scalar, broadcast.
  bool shape_of_first;
};

const std::vector<Operator>& operators();

}  // namespace onnxnorm
