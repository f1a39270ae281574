// The part of onnxruntime's C interface that custom operators of this library need.
//
// onnxruntime promises that its C interface is stable: the table of functions that GetApi(v)
// returns only ever grows at its end, and a custom operator's struct is read no further than the
// version it carries. So a table can be written down as slots: an entry that is called here has its
// type and stands at its documented place, all others are padding. tools/check_abi.py compiles this
// header against the official one, where that is installed, and asserts every offset and every
// signature.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define ONNXNORM_CALL __stdcall
#define ONNXNORM_EXPORT __declspec(dllexport)
#else
#define ONNXNORM_CALL
#define ONNXNORM_EXPORT __attribute__((visibility("default")))
#endif

namespace onnxnorm::ort {

// Version N of the interface came with onnxruntime 1.N. 1.17 is the first whose custom operators
// can use the session's own threads and can tell the shapes of their outputs, and 1.18 the first
// that asks them whether an output may take the memory of an input.
constexpr std::uint32_t kApiVersion = 17;
constexpr std::uint32_t kInPlaceVersion = 18;

// Opaque objects of onnxruntime.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct Value;
struct TensorInfo;

enum ErrorCode : int { kOk = 0, kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kUndefined = 0, kFloat = 1, kFloat16 = 10, kDouble = 11, kBFloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum MemoryType : int { kMemoryDefault = 0 };

// Slots [from, to) of the table that nothing here calls.
template <std::size_t from, std::size_t to>
struct Unused {
  static_assert(from < to);
  void* slot[to - from];
};

struct Api {
  Status*(ONNXNORM_CALL* CreateStatus)(ErrorCode code, const char* message);
  Unused<1, 26> unused_1;
  Status*(ONNXNORM_CALL* CreateCustomOpDomain)(const char* domain, CustomOpDomain** out);
  Status*(ONNXNORM_CALL* CustomOpDomain_Add)(CustomOpDomain* domain, const struct CustomOp* op);
  Status*(ONNXNORM_CALL* AddCustomOpDomain)(SessionOptions* options, CustomOpDomain* domain);
  Unused<29, 51> unused_29;
  Status*(ONNXNORM_CALL* GetTensorMutableData)(Value* value, void** out);
  Unused<52, 57> unused_52;
  Status*(ONNXNORM_CALL* CreateTensorTypeAndShapeInfo)(TensorInfo** out);
  Status*(ONNXNORM_CALL* SetTensorElementType)(TensorInfo* info, ElementType type);
  Status*(ONNXNORM_CALL* SetDimensions)(TensorInfo* info, const std::int64_t* dims,
                                        std::size_t rank);
  Status*(ONNXNORM_CALL* GetTensorElementType)(const TensorInfo* info, ElementType* out);
  Status*(ONNXNORM_CALL* GetDimensionsCount)(const TensorInfo* info, std::size_t* out);
  Status*(ONNXNORM_CALL* GetDimensions)(const TensorInfo* info, std::int64_t* dims,
                                        std::size_t rank);
  Status*(ONNXNORM_CALL* GetSymbolicDimensions)(const TensorInfo* info, const char** names,
                                                std::size_t rank);
  Unused<64, 65> unused_64;
  Status*(ONNXNORM_CALL* GetTensorTypeAndShape)(const Value* value, TensorInfo** out);
  Unused<66, 85> unused_66;
  Status*(ONNXNORM_CALL* KernelInfoGetAttribute_float)(const KernelInfo* info, const char* name,
                                                       float* out);
  Status*(ONNXNORM_CALL* KernelInfoGetAttribute_int64)(const KernelInfo* info, const char* name,
                                                       std::int64_t* out);
  Unused<87, 90> unused_87;
  Status*(ONNXNORM_CALL* KernelContext_GetInput)(const KernelContext* context, std::size_t index,
                                                 const Value** out);
  Status*(ONNXNORM_CALL* KernelContext_GetOutput)(KernelContext* context, std::size_t index,
                                                  const std::int64_t* dims, std::size_t rank,
                                                  Value** out);
  Unused<92, 93> unused_92;
  void(ONNXNORM_CALL* ReleaseStatus)(Status* status);
  Unused<94, 99> unused_94;
  void(ONNXNORM_CALL* ReleaseTensorTypeAndShapeInfo)(TensorInfo* info);
  Unused<100, 101> unused_100;
  void(ONNXNORM_CALL* ReleaseCustomOpDomain)(CustomOpDomain* domain);
  Unused<102, 163> unused_102;
  Status*(ONNXNORM_CALL* KernelInfoGetAttributeArray_int64)(const KernelInfo* info,
                                                            const char* name, std::int64_t* out,
                                                            std::size_t* count);
  Unused<164, 193> unused_164;
  Status*(ONNXNORM_CALL* KernelContext_GetGPUComputeStream)(const KernelContext* context,
                                                            void** out);
  Unused<194, 268> unused_194;
  Status*(ONNXNORM_CALL* ShapeInferContext_GetInputTypeShape)(const ShapeInferContext* context,
                                                              std::size_t index, TensorInfo** out);
  Unused<269, 270> unused_269;
  Status*(ONNXNORM_CALL* ShapeInferContext_SetOutputTypeShape)(const ShapeInferContext* context,
                                                               std::size_t index,
                                                               const TensorInfo* info);
  Status*(ONNXNORM_CALL* SetSymbolicDimensions)(TensorInfo* info, const char** names,
                                                std::size_t rank);
  Unused<272, 274> unused_272;
  Status*(ONNXNORM_CALL* KernelContext_ParallelFor)(const KernelContext* context,
                                                    void (*work)(void* data, std::size_t index),
                                                    std::size_t total, std::size_t batches,
                                                    void* data);
};

struct ApiBase {
  // Null where the runtime is older than `version`.
  const Api*(ONNXNORM_CALL* GetApi)(std::uint32_t version);
  const char*(ONNXNORM_CALL* GetVersionString)();
};

// A custom operator, as far as version 18 of the interface reads it; 17 stops before
// GetMayInplace.
struct CustomOp {
  std::uint32_t version;
  void*(ONNXNORM_CALL* CreateKernel)(const CustomOp* op, const Api* api, const KernelInfo* info);
  const char*(ONNXNORM_CALL* GetName)(const CustomOp* op);
  const char*(ONNXNORM_CALL* GetExecutionProviderType)(const CustomOp* op);
  ElementType(ONNXNORM_CALL* GetInputType)(const CustomOp* op, std::size_t index);
  std::size_t(ONNXNORM_CALL* GetInputTypeCount)(const CustomOp* op);
  ElementType(ONNXNORM_CALL* GetOutputType)(const CustomOp* op, std::size_t index);
  std::size_t(ONNXNORM_CALL* GetOutputTypeCount)(const CustomOp* op);
  void(ONNXNORM_CALL* KernelCompute)(void* kernel, KernelContext* context);
  void(ONNXNORM_CALL* KernelDestroy)(void* kernel);
  Characteristic(ONNXNORM_CALL* GetInputCharacteristic)(const CustomOp* op, std::size_t index);
  Characteristic(ONNXNORM_CALL* GetOutputCharacteristic)(const CustomOp* op, std::size_t index);
  MemoryType(ONNXNORM_CALL* GetInputMemoryType)(const CustomOp* op, std::size_t index);
  int(ONNXNORM_CALL* GetVariadicInputMinArity)(const CustomOp* op);
  int(ONNXNORM_CALL* GetVariadicInputHomogeneity)(const CustomOp* op);
  int(ONNXNORM_CALL* GetVariadicOutputMinArity)(const CustomOp* op);
  int(ONNXNORM_CALL* GetVariadicOutputHomogeneity)(const CustomOp* op);
  Status*(ONNXNORM_CALL* CreateKernelV2)(const CustomOp* op, const Api* api, const KernelInfo* info,
                                         void** kernel);
  Status*(ONNXNORM_CALL* KernelComputeV2)(void* kernel, KernelContext* context);
  Status*(ONNXNORM_CALL* InferOutputShapeFn)(const CustomOp* op, ShapeInferContext* context);
  int(ONNXNORM_CALL* GetStartVersion)(const CustomOp* op);
  int(ONNXNORM_CALL* GetEndVersion)(const CustomOp* op);
  // Output (*outputs)[i] may take the memory of input (*inputs)[i], for i below what is returned.
  // Both arrays go to the function behind it when they were read.
  std::size_t(ONNXNORM_CALL* GetMayInplace)(int** inputs, int** outputs);
  void(ONNXNORM_CALL* ReleaseMayInplace)(int* inputs, int* outputs);
  // The same of outputs that have to.
  std::size_t(ONNXNORM_CALL* GetAliasMap)(int** inputs, int** outputs);
  void(ONNXNORM_CALL* ReleaseAliasMap)(int* inputs, int* outputs);
};

// What the table documents: entry k stands k pointers behind its start.
#define ONNXNORM_AT(entry, index) \
  static_assert(offsetof(::onnxnorm::ort::Api, entry) == (index) * sizeof(void*))
ONNXNORM_AT(CreateCustomOpDomain, 26);
ONNXNORM_AT(AddCustomOpDomain, 28);
ONNXNORM_AT(GetTensorMutableData, 51);
ONNXNORM_AT(GetSymbolicDimensions, 63);
ONNXNORM_AT(GetTensorTypeAndShape, 65);
ONNXNORM_AT(KernelInfoGetAttribute_int64, 86);
ONNXNORM_AT(KernelContext_GetOutput, 91);
ONNXNORM_AT(ReleaseStatus, 93);
ONNXNORM_AT(ReleaseTensorTypeAndShapeInfo, 99);
ONNXNORM_AT(ReleaseCustomOpDomain, 101);
ONNXNORM_AT(KernelInfoGetAttributeArray_int64, 163);
ONNXNORM_AT(KernelContext_GetGPUComputeStream, 193);
ONNXNORM_AT(ShapeInferContext_GetInputTypeShape, 268);
ONNXNORM_AT(SetSymbolicDimensions, 271);
ONNXNORM_AT(KernelContext_ParallelFor, 274);
#undef ONNXNORM_AT

}  // namespace onnxnorm::ort
