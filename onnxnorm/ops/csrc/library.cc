// What onnxruntime calls: RegisterCustomOps, and the operators' callbacks behind it.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <exception>
#include <mutex>
#include <string>
#include <utility>

#include "dispatch.h"
#include "runtime.h"
#if defined(ONNXNORM_CUDA) || defined(ONNXNORM_EMULATED)
#include "cuda.h"
#endif

namespace onnxnorm {
namespace {

constexpr const char* kDomain = "onnxnorm";

// The kernels of a library: those for the CPU, with -DONNXNORM_CUDA those for a GPU too, and with
// -DONNXNORM_EMULATED the latter alone, run by the CPU (device.h).
enum class Place { kCpu, kCuda, kEmulated };
#if defined(ONNXNORM_EMULATED)
constexpr Place kPlaces[] = {Place::kEmulated};
#elif defined(ONNXNORM_CUDA)
constexpr Place kPlaces[] = {Place::kCpu, Place::kCuda};
#else
constexpr Place kPlaces[] = {Place::kCpu};
#endif
constexpr ort::ElementType kElement[kTypes] = {ort::kFloat, ort::kFloat16, ort::kBFloat16,
                                               ort::kDouble};

// Runs `work` and turns what it throws into a status: no exception may cross into onnxruntime.
template <class Work>
ort::Status* guarded(const ort::Api* api, const char* name, const Work& work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const Refusal& refusal) {
    return api->CreateStatus(ort::kInvalidArgument,
                             (std::string(name) + ": " + refusal.what()).c_str());
  } catch (const std::exception& error) {
    return api->CreateStatus(ort::kFail, (std::string(name) + ": " + error.what()).c_str());
  } catch (...) {
    return api->CreateStatus(ort::kFail, name);
  }
}

Shape shape_of(const ort::Api* api, const ort::TensorInfo* info) {
  std::size_t rank = 0;
  check(api->GetDimensionsCount(info, &rank));
  Shape shape(rank);
  check(api->GetDimensions(info, shape.data(), rank));
  return shape;
}

class CpuEngine final : public Engine {
 public:
  explicit CpuEngine(Parallel parallel) : parallel_(std::move(parallel)) {}
  void run(const SoftmaxCall& call) const override { onnxnorm::run(call, parallel_); }
  void run(const NormCall& call) const override { onnxnorm::run(call, parallel_); }
  bool is_device() const override { return false; }

 private:
  Parallel parallel_;
};

#if defined(ONNXNORM_CUDA) || defined(ONNXNORM_EMULATED)
class CudaEngine final : public Engine {
 public:
  explicit CudaEngine(void* stream) : stream_(stream) {}
  void run(const SoftmaxCall& call) const override { cuda::run(call, stream_); }
  void run(const NormCall& call) const override { cuda::run(call, stream_); }
  bool is_device() const override { return true; }

 private:
  void* stream_;
};
#endif

struct Kernel {
  const ort::Api* api;
  const Operator* op;
  Type type;
  Attributes attributes;
  Place place;

  void compute(ort::KernelContext* context) const {
    std::vector<Tensor> inputs(op->inputs);
    for (std::size_t i = 0; i < inputs.size(); ++i) inputs[i] = input(context, i);
    const Shape shape = op->shape(attributes, inputs);
    count(shape);
    ort::Value* output = nullptr;
    check(api->KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &output));
    void* data = nullptr;
    check(api->GetTensorMutableData(output, &data));
    const Invocation invocation{type, attributes, std::move(inputs), data};
#if defined(ONNXNORM_CUDA) || defined(ONNXNORM_EMULATED)
    if (place != Place::kCpu) {
      void* stream = nullptr;
      if (place == Place::kCuda) check(api->KernelContext_GetGPUComputeStream(context, &stream));
      op->compute(invocation, CudaEngine(stream));
      return;
    }
#endif
    op->compute(invocation, CpuEngine(threads_of(context)));
  }

 private:
  Tensor input(const ort::KernelContext* context, std::size_t index) const {
    const ort::Value* value = nullptr;
    check(api->KernelContext_GetInput(context, index, &value));
    if (value == nullptr) throw Refusal("input " + std::to_string(index) + " is absent");
    ort::TensorInfo* raw = nullptr;
    check(api->GetTensorTypeAndShape(value, &raw));
    const Info info(raw, {api});
    void* data = nullptr;
    // onnxruntime has no read-only way to a tensor's data; nothing is written to it.
    check(api->GetTensorMutableData(const_cast<ort::Value*>(value), &data));
    return {data, shape_of(api, info.get())};
  }

  // The session's own threads: the library never makes any.
  Parallel threads_of(const ort::KernelContext* context) const {
    return [this, context](std::size_t n, const std::function<void(std::size_t)>& work) {
      if (n == 1) {
        work(0);
        return;
      }
      struct Shared {
        const std::function<void(std::size_t)>* work;
        std::mutex mutex;
        std::exception_ptr error;
      } shared{&work, {}, nullptr};
      check(api->KernelContext_ParallelFor(
          context,
          [](void* data, std::size_t index) {
            auto* all = static_cast<Shared*>(data);
            try {
              (*all->work)(index);
            } catch (...) {
              const std::lock_guard<std::mutex> lock(all->mutex);
              all->error = std::current_exception();
            }
          },
          n, 0, &shared));
      if (shared.error) std::rethrow_exception(shared.error);
    };
  }
};

// One operator for one element type, as onnxruntime sees it.
struct Registered : ort::CustomOp {
  const Operator* op;
  Type type;
  const ort::Api* api;
  Place place;
};

const Registered& self(const ort::CustomOp* op) { return *static_cast<const Registered*>(op); }

// -- shape inference ------------------------------------------------------------------------------

struct Known {
  Shape sizes;  // -1: not known, or a name
  std::vector<std::string> names;
};

Known known_shape(const ort::Api* api, const ort::TensorInfo* info) {
  Known known{shape_of(api, info), {}};
  std::vector<const char*> names(known.sizes.size());
  check(api->GetSymbolicDimensions(info, names.data(), names.size()));
  for (const char* name : names) known.names.emplace_back(name == nullptr ? "" : name);
  return known;
}

// The broadcast of two shapes as far as it is known; at run time the kernel judges.
Known broadcast_known(const Known& a, const Known& b) {
  const Known& longer = a.sizes.size() >= b.sizes.size() ? a : b;
  const Known& shorter = a.sizes.size() >= b.sizes.size() ? b : a;
  Known out = longer;
  const std::size_t shift = longer.sizes.size() - shorter.sizes.size();
  for (std::size_t i = 0; i < shorter.sizes.size(); ++i) {
    std::int64_t& size = out.sizes[shift + i];
    std::string& name = out.names[shift + i];
    const bool same =
        size == shorter.sizes[i] && name == shorter.names[i] && (size >= 0 || !name.empty());
    if (same || shorter.sizes[i] == 1 || size > 1) continue;
    if (size == 1 || shorter.sizes[i] > 1) {
      size = shorter.sizes[i];
      name = shorter.names[i];
    } else {
      size = -1;
      name.clear();
    }
  }
  return out;
}

// onnxruntime takes an unknown size without a name for the number -1: an Add finds it different
// from the size that it is, and a Slice behind it ends the process. So each has a name of its own.
Known named(Known known) {
  static std::atomic<std::uint64_t> count{0};
  for (std::size_t i = 0; i < known.sizes.size(); ++i) {
    if (known.sizes[i] >= 0 || !known.names[i].empty()) continue;
    known.names[i] = "onnxnorm_unknown_" + std::to_string(count++);
  }
  return known;
}

void infer(const Registered& me, ort::ShapeInferContext* context) {
  const ort::Api* api = me.api;
  const auto info_of = [&](std::size_t index) {
    ort::TensorInfo* raw = nullptr;
    check(api->ShapeInferContext_GetInputTypeShape(context, index, &raw));
    return raw;  // onnxruntime's own
  };
  const ort::TensorInfo* first = info_of(0);
  std::size_t rank = 0;
  check(api->GetDimensionsCount(first, &rank));
  // Rank 0 stands for an unknown rank too, and no operator here takes a scalar.
  if (rank == 0) return;
  Known out = known_shape(api, first);
  if (!me.op->shape_of_first) {
    // A scalar, or a mask of unknown rank, which may make the output larger than the first input: a
    // wrong shape here would let onnxruntime lay the output into memory that is too small.
    const Known mask = known_shape(api, info_of(2));
    if (mask.sizes.empty()) return;
    out = broadcast_known(out, mask);
  }
  out = named(std::move(out));
  ort::TensorInfo* raw = nullptr;
  check(api->CreateTensorTypeAndShapeInfo(&raw));
  const Info info(raw, {api});
  std::vector<const char*> names;
  for (const std::string& name : out.names) names.push_back(name.c_str());
  // Not kElement[me.type]: onnxruntime asks one of the operators of this name, whatever the type.
  ort::ElementType type = ort::kUndefined;
  check(api->GetTensorElementType(first, &type));
  check(api->SetTensorElementType(raw, type));
  check(api->SetDimensions(raw, out.sizes.data(), out.sizes.size()));
  check(api->SetSymbolicDimensions(raw, names.data(), names.size()));
  check(api->ShapeInferContext_SetOutputTypeShape(context, 0, raw));
}

// Output 0 may take the memory of input 0. onnxruntime gives it where it proved that both have one
// type and shape and that nobody else reads the input, who waits for a run's end included.
std::size_t first_in_place(int** inputs, int** outputs) {
  static int of_input[] = {0};
  static int of_output[] = {0};
  *inputs = of_input;
  *outputs = of_output;
  return 1;
}

Registered registered(const Operator& op, Type type, const ort::Api* api, std::uint32_t version,
                      Place place) {
  Registered made{};
  made.op = &op;
  made.type = type;
  made.api = api;
  made.place = place;
  made.version = version;
  made.GetName = [](const ort::CustomOp* me) { return self(me).op->name; };
  made.GetExecutionProviderType = [](const ort::CustomOp* me) -> const char* {
    return self(me).place == Place::kCuda ? "CUDAExecutionProvider" : nullptr;  // null: the CPU's
  };
  made.GetInputType = [](const ort::CustomOp* me, std::size_t) { return kElement[self(me).type]; };
  made.GetInputTypeCount = [](const ort::CustomOp* me) { return self(me).op->inputs; };
  made.GetOutputType = [](const ort::CustomOp* me, std::size_t) { return kElement[self(me).type]; };
  made.GetOutputTypeCount = [](const ort::CustomOp*) -> std::size_t { return 1; };
  made.GetInputCharacteristic = [](const ort::CustomOp*, std::size_t) { return ort::kRequired; };
  made.GetOutputCharacteristic = [](const ort::CustomOp*, std::size_t) { return ort::kRequired; };
  made.GetInputMemoryType = [](const ort::CustomOp*, std::size_t) { return ort::kMemoryDefault; };
  made.GetVariadicInputMinArity = [](const ort::CustomOp*) { return 0; };
  made.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };
  made.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 0; };
  made.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  made.CreateKernelV2 = [](const ort::CustomOp* me, const ort::Api* used,
                           const ort::KernelInfo* info, void** kernel) {
    return guarded(used, self(me).op->name, [&] {
      const Operator& row = *self(me).op;
      const Attributes attributes = row.read(AttributeReader(used, info), self(me).type);
      *kernel =
          std::make_unique<Kernel>(Kernel{used, &row, self(me).type, attributes, self(me).place})
              .release();
    });
  };
  made.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
    const auto* me = static_cast<const Kernel*>(kernel);
    return guarded(me->api, me->op->name, [&] { me->compute(context); });
  };
  made.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  made.InferOutputShapeFn = [](const ort::CustomOp* me, ort::ShapeInferContext* context) {
    return guarded(self(me).api, self(me).op->name, [&] { infer(self(me), context); });
  };
  made.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  made.GetEndVersion = [](const ort::CustomOp*) { return 1; };
  made.GetMayInplace = first_in_place;
  made.ReleaseMayInplace = [](int*, int*) {};  // they are not of the heap
  return made;
}

// The version that operators can carry: the newest of which something is used here and that this
// runtime knows, or it would refuse them. GetApi prints a line where it has to say no, so a runtime
// that calls itself 1.17 is not asked.
std::uint32_t common_version(const ort::ApiBase& base) {
  int major = 0;
  unsigned minor = 0;
  const bool told = std::sscanf(base.GetVersionString(), "%d.%u", &major, &minor) == 2;
  const bool newer = told && (major > 1 || (major == 1 && minor >= ort::kInPlaceVersion));
  return newer && base.GetApi(ort::kInPlaceVersion) != nullptr ? ort::kInPlaceVersion
                                                               : ort::kApiVersion;
}

// The GPU architectures that the kernels were compiled for.
std::vector<std::string> architectures() {
#if defined(ONNXNORM_CUDA)
  return {ONNXNORM_CUDA};
#else
  return {};
#endif
}

// onnxruntime keeps pointers to the domain and its operators as long as a session lives, and a
// session can be destroyed by the program's last destructor. So they are never destroyed: one
// domain for each runtime in the process.
struct Domain {
  const ort::Api* api;
  ort::CustomOpDomain* domain;
  std::deque<Registered> ops;
};

ort::CustomOpDomain* domain_for(const ort::Api* api, std::uint32_t version) {
  static std::mutex mutex;
  static auto& domains = *new std::deque<Domain>;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Domain& known : domains) {
    if (known.api == api) return known.domain;
  }
  Domain& made = domains.emplace_back();
  made.api = api;
  try {
    check(api->CreateCustomOpDomain(kDomain, &made.domain));
    for (const Operator& op : operators()) {
      for (int type = 0; type < kTypes; ++type) {
        for (const Place place : kPlaces) {
          made.ops.push_back(registered(op, static_cast<Type>(type), api, version, place));
          check(api->CustomOpDomain_Add(made.domain, &made.ops.back()));
        }
      }
    }
  } catch (...) {
    if (made.domain != nullptr) api->ReleaseCustomOpDomain(made.domain);
    domains.pop_back();
    throw;
  }
  return made.domain;
}

}  // namespace

bool AttributeReader::found(ort::Status* status) const {
  if (status == nullptr) return true;
  api_->ReleaseStatus(status);
  return false;
}

std::int64_t AttributeReader::integer(const char* name, std::int64_t otherwise) const {
  std::int64_t value = 0;
  return found(api_->KernelInfoGetAttribute_int64(info_, name, &value)) ? value : otherwise;
}

double AttributeReader::real(const char* name, double otherwise) const {
  float value = 0;
  const bool given = found(api_->KernelInfoGetAttribute_float(info_, name, &value));
  return given ? static_cast<double>(value) : otherwise;
}

std::vector<std::int64_t> AttributeReader::integers(const char* name) const {
  constexpr std::size_t kMost = 64;  // no tensor has more axes
  std::size_t size = 0;
  if (!found(api_->KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size)) || size == 0 ||
      size > kMost) {
    throw Refusal(std::string(name) + " is missing, empty or no list of axes");
  }
  std::vector<std::int64_t> values(size);
  check(api_->KernelInfoGetAttributeArray_int64(info_, name, values.data(), &size));
  return values;
}

}  // namespace onnxnorm

extern "C" {

ONNXNORM_EXPORT onnxnorm::ort::Status* ONNXNORM_CALL
RegisterCustomOps(onnxnorm::ort::SessionOptions* options, const onnxnorm::ort::ApiBase* base) {
  namespace ort = onnxnorm::ort;
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {
    // Version 1 has CreateStatus, and every runtime has version 1.
    const std::string text =
        "the operator library of onnxnorm needs onnxruntime 1.17 or newer, "
        "and this is " +
        std::string(base->GetVersionString());
    return base->GetApi(1)->CreateStatus(ort::kFail, text.c_str());
  }
  const std::uint32_t version = onnxnorm::common_version(*base);
  return onnxnorm::guarded(api, "onnxnorm", [&] {
    onnxnorm::check(api->AddCustomOpDomain(options, onnxnorm::domain_for(api, version)));
  });
}

// What is in this library, as JSON; valid until this thread asks again.
ONNXNORM_EXPORT const char* onnxnorm_ops_describe() {
  static thread_local std::string text;
  const auto list = [](const auto& names) {
    std::string out;
    for (const auto& name : names) out += (out.empty() ? "\"" : ", \"") + std::string(name) + "\"";
    return "[" + out + "]";
  };
  std::vector<std::string> usable;
  for (const auto* table : onnxnorm::usable_kernels()) usable.emplace_back(table->name);
  std::vector<std::string> names;
  for (const auto& op : onnxnorm::operators()) names.emplace_back(op.name);
  text = "{\"instruction_set\": \"" + std::string(onnxnorm::kernels().name) +
         "\", \"built\": " + list(onnxnorm::built_kernels()) + ", \"usable\": " + list(usable) +
         ", \"operators\": " + list(names) +
         ", \"architectures\": " + list(onnxnorm::architectures()) +
         ", \"types\": [\"float\", \"float16\", \"bfloat16\", \"double\"]}";
  return text.c_str();
}

// Chooses the instruction set by name, for the whole process; 0 where it is not usable.
ONNXNORM_EXPORT int onnxnorm_ops_select(const char* name) {
  return onnxnorm::select_kernels(name) ? 1 : 0;
}

}  // extern "C"
