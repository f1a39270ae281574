// Asserts that onnxnorm/ops/csrc/ort_abi.h says what onnxruntime's own header says: where each
// entry of the function table and of a custom operator stands, and what type it has. Compiled,
// never run, by tools/check_abi.py.
#include <onnxruntime_c_api.h>

#include <cstddef>
#include <type_traits>

#include "ort_abi.h"

namespace ours = onnxnorm::ort;

// like<A, B>: two types that a call passes in the same way and for the same thing.
template <class A, class B>
struct Like : std::bool_constant<std::is_same_v<A, B> || (std::is_enum_v<A> && std::is_enum_v<B> &&
                                                          sizeof(A) == sizeof(B))> {};
template <class A, class B>
struct Like<A*, B*> : Like<A, B> {};
template <class A, class B>
struct Like<const A, const B> : Like<A, B> {};
// An array parameter of the official header is a pointer already; noexcept is no part of the ABI.
template <class R, class... As, class S, class... Bs>
struct Like<R (*)(As...), S (*)(Bs...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(As) != sizeof...(Bs))
      return false;
    else
      return Like<R, S>::value && (Like<As, Bs>::value && ...);
  }();
};
template <class R, class... As, class S, class... Bs>
struct Like<R (*)(As...) noexcept, S (*)(Bs...)> : Like<R (*)(As...), S (*)(Bs...)> {};

#define SAME(official, own) \
  template <>               \
  struct Like<official, own> : std::true_type {}
SAME(OrtStatus, ours::Status);
SAME(OrtSessionOptions, ours::SessionOptions);
SAME(OrtCustomOpDomain, ours::CustomOpDomain);
SAME(OrtKernelInfo, ours::KernelInfo);
SAME(OrtKernelContext, ours::KernelContext);
SAME(OrtShapeInferContext, ours::ShapeInferContext);
SAME(OrtValue, ours::Value);
SAME(OrtTensorTypeAndShapeInfo, ours::TensorInfo);
SAME(OrtApi, ours::Api);
SAME(OrtCustomOp, ours::CustomOp);
#undef SAME

#define ENTRY(type, own, name)                                                           \
  static_assert(offsetof(type, name) == offsetof(own, name), #name " stands elsewhere"); \
  static_assert(Like<decltype(type::name), decltype(own::name)>::value, #name " has another type")
#define API(name) ENTRY(OrtApi, ours::Api, name)
API(CreateStatus);
API(CreateCustomOpDomain);
API(CustomOpDomain_Add);
API(AddCustomOpDomain);
API(GetTensorMutableData);
API(CreateTensorTypeAndShapeInfo);
API(SetTensorElementType);
API(SetDimensions);
API(GetTensorElementType);
API(GetDimensionsCount);
API(GetDimensions);
API(GetSymbolicDimensions);
API(GetTensorTypeAndShape);
API(KernelInfoGetAttribute_float);
API(KernelInfoGetAttribute_int64);
API(KernelContext_GetInput);
API(KernelContext_GetOutput);
API(ReleaseStatus);
API(ReleaseTensorTypeAndShapeInfo);
API(ReleaseCustomOpDomain);
API(KernelInfoGetAttributeArray_int64);
API(KernelContext_GetGPUComputeStream);
API(ShapeInferContext_GetInputTypeShape);
API(ShapeInferContext_SetOutputTypeShape);
API(SetSymbolicDimensions);
API(KernelContext_ParallelFor);

#define OP(name) ENTRY(OrtCustomOp, ours::CustomOp, name)
OP(version);
OP(CreateKernel);
OP(GetName);
OP(GetExecutionProviderType);
OP(GetInputType);
OP(GetInputTypeCount);
OP(GetOutputType);
OP(GetOutputTypeCount);
OP(KernelCompute);
OP(KernelDestroy);
OP(GetInputCharacteristic);
OP(GetOutputCharacteristic);
OP(GetInputMemoryType);
OP(GetVariadicInputMinArity);
OP(GetVariadicInputHomogeneity);
OP(GetVariadicOutputMinArity);
OP(GetVariadicOutputHomogeneity);
OP(CreateKernelV2);
OP(KernelComputeV2);
OP(InferOutputShapeFn);
OP(GetStartVersion);
OP(GetEndVersion);
OP(GetMayInplace);
OP(ReleaseMayInplace);
OP(GetAliasMap);
OP(ReleaseAliasMap);

#define BASE(name) ENTRY(OrtApiBase, ours::ApiBase, name)
BASE(GetApi);
BASE(GetVersionString);

#define VALUE(official, own) static_assert(static_cast<int>(official) == static_cast<int>(own))
VALUE(ORT_OK, ours::kOk);
VALUE(ORT_FAIL, ours::kFail);
VALUE(ORT_INVALID_ARGUMENT, ours::kInvalidArgument);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, ours::kUndefined);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ours::kFloat);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ours::kFloat16);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, ours::kDouble);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ours::kBFloat16);
VALUE(INPUT_OUTPUT_REQUIRED, ours::kRequired);
VALUE(INPUT_OUTPUT_OPTIONAL, ours::kOptional);
VALUE(INPUT_OUTPUT_VARIADIC, ours::kVariadic);
VALUE(OrtMemTypeDefault, ours::kMemoryDefault);
static_assert(ORT_API_VERSION >= ours::kInPlaceVersion,
              "this header is older than what we ask for");
