// A block of a GPU on one thread of the CPU: each of its threads is a fiber that runs until it has
// to wait for others. For tests of the kernels, never for speed.
//
// What it is strict about, where a GPU would be undefined: every thread of a block has to reach
// each barrier, and every lane of a warp each shuffle; else `launch` throws. A barrier that is
// missing shows in the results of one of two orders: ONNXNORM_EMULATED_ORDER=reverse runs warps and
// threads from the last to the first.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxnorm::device::emulation {

struct F16 {
  std::uint16_t bits;
};
struct BF16 {
  std::uint16_t bits;
};

float widen(F16 value);
float widen(BF16 value);
// Rounds to nearest, ties to even.
void narrow(float value, F16* out);
void narrow(float value, BF16* out);

int thread_index();
int threads();
std::int64_t block_index();
std::int64_t blocks();
void barrier();

// Exchanges 8 bytes with another lane of the warp.
std::uint64_t exchange(std::uint64_t bits, int lanes);

template <class V>
V shuffle_xor(V value, int lanes) {
  static_assert(sizeof(V) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, lanes);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Runs `body(argument)` in `threads` threads of each of `blocks` blocks. Throws std::logic_error
// where threads of a block wait for others that are done.
void launch(std::int64_t blocks, int threads, void (*body)(const void*), const void* argument);

}  // namespace onnxnorm::device::emulation
