// The operators of another library, with a note of where each call's first input and its output
// stood: what onnxruntime has to say about memory it says to nobody else.
//
//   spy_on(path, in_place)      before a session is made; in_place = 0 takes the permission away
//   spy_counts(&same, &apart)   since the last call: outputs in their first input's memory, others
#include <dlfcn.h>

#include <atomic>
#include <map>

#include "ort_abi.h"

namespace ort = onnxnorm::ort;

namespace {

using Register = ort::Status* (*)(ort::SessionOptions*, const ort::ApiBase*);

Register registered_by = nullptr;
const ort::ApiBase* real_base = nullptr;
const ort::Api* real = nullptr;
ort::Api spied[2];  // with the permission taken away, and with it
int chosen = 0;
ort::ApiBase base;
std::map<const ort::CustomOp*, decltype(ort::CustomOp::CreateKernelV2)> create_kernel;
std::atomic<int> same{0}, apart{0};
thread_local const void* first_input = nullptr;

const void* data_of(const ort::Value* value) {
  void* data = nullptr;
  real->GetTensorMutableData(const_cast<ort::Value*>(value), &data);
  return data;
}

ort::Status* get_input(const ort::KernelContext* context, std::size_t index,
                       const ort::Value** out) {
  ort::Status* status = real->KernelContext_GetInput(context, index, out);
  if (index == 0) first_input = data_of(*out);
  return status;
}

ort::Status* get_output(ort::KernelContext* context, std::size_t index, const std::int64_t* dims,
                        std::size_t rank, ort::Value** out) {
  ort::Status* status = real->KernelContext_GetOutput(context, index, dims, rank, out);
  if (status == nullptr) ++(data_of(*out) == first_input ? same : apart);
  return status;
}

template <int in_place>
ort::Status* add(ort::CustomOpDomain* domain, const ort::CustomOp* op) {
  auto* changed = const_cast<ort::CustomOp*>(op);
  if (in_place == 0) changed->GetMayInplace = nullptr;
  create_kernel[op] = op->CreateKernelV2;
  changed->CreateKernelV2 = [](const ort::CustomOp* me, const ort::Api*,
                               const ort::KernelInfo* info, void** kernel) {
    return create_kernel.at(me)(me, &spied[in_place], info, kernel);
  };
  return real->CustomOpDomain_Add(domain, op);
}

const ort::Api* get_api(std::uint32_t version) {
  real = real_base->GetApi(version);
  if (real == nullptr) return nullptr;
  spied[chosen] = *real;
  spied[chosen].KernelContext_GetInput = get_input;
  spied[chosen].KernelContext_GetOutput = get_output;
  spied[chosen].CustomOpDomain_Add = chosen == 0 ? add<0> : add<1>;
  return &spied[chosen];
}

}  // namespace

extern "C" {

ONNXNORM_EXPORT int spy_on(const char* path, int in_place) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  registered_by = library == nullptr
                      ? nullptr
                      : reinterpret_cast<Register>(dlsym(library, "RegisterCustomOps"));
  chosen = in_place;
  return registered_by != nullptr;
}

ONNXNORM_EXPORT void spy_counts(int* in_place, int* elsewhere) {
  *in_place = same.exchange(0);
  *elsewhere = apart.exchange(0);
}

ONNXNORM_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                               const ort::ApiBase* given) {
  real_base = given;
  base = {get_api, given->GetVersionString};
  return registered_by(options, &base);
}
}
