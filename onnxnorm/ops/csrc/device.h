// What a kernel for a GPU is written in: threads of a block, barriers, shuffles in a warp, shared
// memory, storage types, and `launch`. nvcc compiles it to CUDA; any other compiler to an emulation
// on the CPU (emulation.h), so the same kernels are tested where there is no GPU.
//
// A kernel is a struct with `void operator()() const` and its arguments as members.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define ONNXNORM_DEVICE __device__ __forceinline__
#define ONNXNORM_SHARED(type, name, size) __shared__ type name[size]
#define ONNXNORM_UNROLL _Pragma("unroll")
#else
#include "emulation.h"
#define ONNXNORM_DEVICE inline
// The threads of a block share one thread of the CPU, which runs one block at a time.
#define ONNXNORM_SHARED(type, name, size) static thread_local type name[size]
#define ONNXNORM_UNROLL
#endif

namespace onnxnorm::device {

constexpr int kWarp = 32;
constexpr int kMostThreads = 512;

// Blocks of a grid at most; kernels go on where the grid ends, which the emulation always tries.
#if defined(__CUDACC__)
constexpr std::int64_t kMostBlocks = 1 << 20;
#else
constexpr std::int64_t kMostBlocks = 3;
#endif

#if defined(__CUDACC__)

using Stream = cudaStream_t;
using F16 = __half;
using BF16 = __nv_bfloat16;

ONNXNORM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
ONNXNORM_DEVICE int threads() { return static_cast<int>(blockDim.x); }
ONNXNORM_DEVICE std::int64_t block_index() { return blockIdx.x; }
ONNXNORM_DEVICE std::int64_t blocks() { return gridDim.x; }
ONNXNORM_DEVICE void barrier() { __syncthreads(); }

template <class V>
ONNXNORM_DEVICE V shuffle_xor(V value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

ONNXNORM_DEVICE float widen(F16 value) { return __half2float(value); }
ONNXNORM_DEVICE float widen(BF16 value) { return __bfloat162float(value); }
ONNXNORM_DEVICE void narrow(float value, F16* out) { *out = __float2half_rn(value); }
ONNXNORM_DEVICE void narrow(float value, BF16* out) { *out = __float2bfloat16_rn(value); }
ONNXNORM_DEVICE float exp_of(float x) { return expf(x); }
ONNXNORM_DEVICE double exp_of(double x) { return exp(x); }
ONNXNORM_DEVICE float log_of(float x) { return logf(x); }
ONNXNORM_DEVICE double log_of(double x) { return log(x); }
ONNXNORM_DEVICE float root_of(float x) { return sqrtf(x); }
ONNXNORM_DEVICE double root_of(double x) { return sqrt(x); }

template <class Kernel>
__global__ void __launch_bounds__(kMostThreads) entry(const Kernel kernel) {
  kernel();
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class Kernel>
void launch(const Kernel& kernel, std::int64_t blocks, int threads, Stream stream) {
  entry<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(kernel);
  check(cudaGetLastError());
}

// Memory of a stream: valid for what is launched on it between allocation and release.
inline void* allocate(std::size_t bytes, Stream stream) {
  void* memory = nullptr;
  check(cudaMallocAsync(&memory, bytes, stream));
  return memory;
}
inline void release(void* memory, Stream stream) { cudaFreeAsync(memory, stream); }

#else

ONNXNORM_DEVICE int thread_index() { return emulation::thread_index(); }
ONNXNORM_DEVICE int threads() { return emulation::threads(); }
ONNXNORM_DEVICE std::int64_t block_index() { return emulation::block_index(); }
ONNXNORM_DEVICE std::int64_t blocks() { return emulation::blocks(); }
ONNXNORM_DEVICE void barrier() { emulation::barrier(); }

template <class V>
ONNXNORM_DEVICE V shuffle_xor(V value, int lanes) {
  return emulation::shuffle_xor(value, lanes);
}

using Stream = void*;
using emulation::BF16;
using emulation::F16;
using emulation::narrow;
using emulation::widen;

ONNXNORM_DEVICE float exp_of(float x) { return std::exp(x); }
ONNXNORM_DEVICE double exp_of(double x) { return std::exp(x); }
ONNXNORM_DEVICE float log_of(float x) { return std::log(x); }
ONNXNORM_DEVICE double log_of(double x) { return std::log(x); }
ONNXNORM_DEVICE float root_of(float x) { return std::sqrt(x); }
ONNXNORM_DEVICE double root_of(double x) { return std::sqrt(x); }

template <class Kernel>
void launch(const Kernel& kernel, std::int64_t blocks, int threads, Stream) {
  emulation::launch(
      blocks, threads, [](const void* self) { (*static_cast<const Kernel*>(self))(); }, &kernel);
}

inline void* allocate(std::size_t bytes, Stream) { return ::operator new(bytes); }
inline void release(void* memory, Stream) { ::operator delete(memory); }

#endif

ONNXNORM_DEVICE float widen(float value) { return value; }
ONNXNORM_DEVICE double widen(double value) { return value; }
ONNXNORM_DEVICE void narrow(float value, float* out) { *out = value; }
ONNXNORM_DEVICE void narrow(double value, double* out) { *out = value; }

// The type that a storage type is computed in.
template <class T>
struct LaneOf {
  using Type = float;
};
template <>
struct LaneOf<double> {
  using Type = double;
};

}  // namespace onnxnorm::device
