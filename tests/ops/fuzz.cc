// Random shapes, axes, masks, types and special values through the operators, for the sanitizers:
// every buffer has exactly the size that the operator may touch. Results are held against sums in
// long double, loosely; tests/ops/test_softmax.py and test_norm.py judge accuracy.
//
//   fuzz <seed> <rounds>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "operators.h"
#if defined(ONNXNORM_EMULATED)
#include "cuda.h"
#endif

using namespace onnxnorm;

namespace {

std::mt19937_64 random_engine;
std::int64_t below(std::int64_t n) {
  return static_cast<std::int64_t>(random_engine() % static_cast<std::uint64_t>(n));
}

float from_half(std::uint16_t bits, Type type) {
  if (type == kBF16) {
    const std::uint32_t wide = std::uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  return sign * std::ldexp(exponent == 0 ? static_cast<float>(mantissa)
                                         : static_cast<float>(mantissa + 1024),
                           (exponent == 0 ? 1 : exponent) - 25);
}

double read(const void* data, std::int64_t i, Type type) {
  if (type == kF32) return static_cast<const float*>(data)[i];
  if (type == kF64) return static_cast<const double*>(data)[i];
  return from_half(static_cast<const std::uint16_t*>(data)[i], type);
}

// A buffer on the heap that ends where the tensor ends.
struct Buffer {
  explicit Buffer(std::size_t bytes) : data(std::malloc(bytes == 0 ? 1 : bytes)) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data;
};

// Ordinary values, and where `special`, infinities, NaN, extremes and denormals among them.
void fill(void* data, std::int64_t n, Type type, bool special) {
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < n; ++i) {
    double value = normal(random_engine);
    if (special && below(50) == 0) {
      const double odd[] = {INFINITY, -INFINITY, NAN, -3e38, 3e38, 1e-40, -1e9, 0.0};
      value = odd[below(8)];
    }
    if (type == kF32)
      static_cast<float*>(data)[i] = static_cast<float>(value);
    else if (type == kF64)
      static_cast<double*>(data)[i] = value;
    else if (special)
      static_cast<std::uint16_t*>(data)[i] = static_cast<std::uint16_t>(below(65536));
    else
      static_cast<std::uint16_t*>(data)[i] =
          static_cast<std::uint16_t>((type == kF16 ? 0x3800 : 0x3f00) + below(256));
  }
}

Shape random_shape(std::int64_t most) {
  Shape shape(static_cast<std::size_t>(1 + below(4)));
  for (auto& size : shape) {
    const std::int64_t kind = below(8);
    size = kind == 0 ? below(2) : kind == 1 ? 1 + below(700) : 1 + below(33);
  }
  while (count(shape) > most) {
    auto& largest = *std::max_element(shape.begin(), shape.end());
    largest = largest / 3 + 1;
  }
  return shape;
}

Shape broadcastable(const Shape& shape) {
  Shape out;
  const auto skip = static_cast<std::size_t>(below(static_cast<std::int64_t>(shape.size()) + 1));
  for (std::size_t i = skip; i < shape.size(); ++i) out.push_back(below(2) == 0 ? 1 : shape[i]);
  return out;
}

[[maybe_unused]] const Parallel threaded = [](std::size_t n,
                                              const std::function<void(std::size_t)>& work) {
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t i = t; i < n; i += 2) work(i);
    });
  }
  for (auto& thread : threads) thread.join();
};

// The kernels for a GPU where they are emulated, else those for the CPU.
template <class Call>
void run(const Call& call) {
#if defined(ONNXNORM_EMULATED)
  cuda::run(call, nullptr);
#else
  run(call, threaded);
#endif
}

void fail(const char* what, double found, double wanted) {
  std::printf("%s: %g and not %g (%s)\n", what, found, wanted, kernels().name);
  std::exit(1);
}

void check(const char* what, double found, double wanted, double tolerance) {
  if (std::isnan(wanted) != std::isnan(found)) fail(what, found, wanted);
  if (!std::isnan(wanted) && !(std::fabs(found - wanted) <= tolerance) && found != wanted) {
    fail(what, found, wanted);
  }
}

// The same call with its output in the memory of its input has to give the same bits.
template <class Call>
void check_in_place(const char* what, Call call, std::size_t bytes) {
  Buffer both(bytes);
  std::memcpy(both.data, call.x.data, bytes);
  const void* apart = call.y;
  call.x.data = both.data;
  call.y = both.data;
  run(call);
  if (std::memcmp(apart, both.data, bytes) != 0) fail(what, 1, 0);
}

void one_softmax() {
  const auto type = static_cast<Type>(below(kTypes));
  const auto bytes = static_cast<std::size_t>(kBytes[type]);
  Shape shape = random_shape(20000);
  if (below(12) == 0) shape = {below(3) + 1, 262144 + below(100)};
  const Shape mask_shape = broadcastable(shape);
  const bool with_mask = below(2) == 0, special = below(3) == 0, log = below(2) == 0;
  const std::int64_t elements = count(shape);
  Buffer x(static_cast<std::size_t>(elements) * bytes),
      y(static_cast<std::size_t>(elements) * bytes);
  Buffer m(static_cast<std::size_t>(count(mask_shape)) * bytes);
  fill(x.data, elements, type, special);
  fill(m.data, count(mask_shape), type, special);
  const Tensor mask{m.data, mask_shape};
  const std::int64_t rank = static_cast<std::int64_t>(shape.size());
  const std::int64_t axis = below(2 * rank) - rank;
  const double scale = with_mask ? 0.5 : 1;
  const SoftmaxCall call{type, {x.data, shape}, with_mask ? &mask : nullptr, scale, axis,
                         log,  y.data};
  run(call);
  check_in_place("softmax in place", call, static_cast<std::size_t>(elements) * bytes);
  if (special || elements == 0) return;  // the sanitizers have judged
  const std::size_t a = resolve_axis(axis, shape.size());
  std::int64_t inner = 1;
  for (std::size_t i = a + 1; i < shape.size(); ++i) inner *= shape[i];
  std::vector<Dim> dims(shape.size());
  for (std::size_t i = 0; i < dims.size(); ++i) dims[i] = {shape[i], {}, false};
  add_strides(dims, 0, shape, shape, "x");
  add_strides(dims, 1, mask_shape, shape, "mask");
  const auto value = [&](std::int64_t at) {
    const double v = scale * read(x.data, at, type);
    return with_mask ? v + read(m.data, offsets(dims, at)[1], type) : v;
  };
  for (int probe = 0; probe < 3; ++probe) {
    const std::int64_t at = below(elements);
    const std::int64_t start = at - at / inner % shape[a] * inner;
    double sum = 0;
    for (std::int64_t k = 0; k < shape[a]; ++k) sum += std::exp(value(start + k * inner));
    const double wanted = log ? value(at) - std::log(sum) : std::exp(value(at)) / sum;
    const double unit = type == kF64 ? 1e-12 : type == kF32 ? 4e-6 : type == kF16 ? 2e-3 : 1e-2;
    check("softmax", read(y.data, at, type), wanted,
          unit * (log ? 1 + std::fabs(wanted) : wanted) + 1e-7);
  }
}

void one_norm() {
  const auto type = static_cast<Type>(below(kTypes));
  const auto bytes = static_cast<std::size_t>(kBytes[type]);
  const Shape shape = random_shape(20000);
  const Shape scale_shape = broadcastable(shape), bias_shape = broadcastable(shape);
  const std::int64_t elements = count(shape);
  Buffer x(static_cast<std::size_t>(elements) * bytes),
      y(static_cast<std::size_t>(elements) * bytes);
  Buffer s(static_cast<std::size_t>(count(scale_shape)) * bytes);
  Buffer b(static_cast<std::size_t>(count(bias_shape)) * bytes);
  const bool special = below(3) == 0, centered = below(2) == 0;
  fill(x.data, elements, type, special);
  fill(s.data, count(scale_shape), type, special);
  fill(b.data, count(bias_shape), type, special);
  std::vector<std::int64_t> axes;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (below(2) == 0) axes.push_back(static_cast<std::int64_t>(i));
  }
  if (axes.empty()) axes.push_back(0);
  const Tensor bias{b.data, bias_shape};
  const NormCall call{type,
                      {x.data, shape},
                      {s.data, scale_shape},
                      below(3) == 0 ? nullptr : &bias,
                      axes,
                      1e-5,
                      centered,
                      below(3) == 0,
                      y.data};
  run(call);
  check_in_place("norm in place", call, static_cast<std::size_t>(elements) * bytes);
}

void refusals() {
  float data[4] = {};
  const Tensor wrong{data, {3}};
  int refused = 0;
  const auto expect = [&](const auto& work) {
    try {
      work();
    } catch (const Refusal&) {
      ++refused;
    }
  };
  expect([&] { run(SoftmaxCall{kF32, {data, {2, 2}}, nullptr, 1, 2, false, data}); });
  expect([&] { run(SoftmaxCall{kF32, {data, {2, 2}}, &wrong, 1, 1, false, data}); });
  expect([&] { run(SoftmaxCall{kF32, {data, {-1, 2}}, nullptr, 1, 1, false, data}); });
  expect([&] { run(SoftmaxCall{kF32, {data, {INT64_MAX / 2, 4}}, nullptr, 1, 1, false, data}); });
  expect([&] { count({INT64_MAX, INT64_MAX}); });
  if (refused != 5) fail("refusals", refused, 5);
  const Shape empty{INT64_MAX, INT64_MAX, 0};
  if (count(empty) != 0) fail("an empty tensor", 1, 0);
  run(SoftmaxCall{kF32, {data, empty}, nullptr, 1, 1, false, data});
  run(NormCall{kF32, {data, empty}, {data, {1}}, nullptr, {1}, 1e-5, true, false, data});
}

}  // namespace

int main(int argc, char** argv) {
  const auto seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 100;
  refusals();
  for (const Kernels* table : usable_kernels()) {
    select_kernels(table->name);
    random_engine.seed(seed);
    for (int i = 0; i < rounds; ++i) {
      one_softmax();
      one_norm();
    }
    std::printf("%s: %d rounds\n", table->name, rounds);
  }
  return 0;
}
