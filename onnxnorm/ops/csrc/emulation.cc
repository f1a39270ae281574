#include "emulation.h"

#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace onnxnorm::device::emulation {
namespace {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr int kWarp = 32;

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;  // AddressSanitizer's
  bool done = false;
};

struct Warp {
  // Two sets in turn: a lane can be ahead of another by one shuffle and no more.
  std::uint64_t slots[2][kWarp];
  int arrived = 0;
  std::uint64_t generation = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  ucontext_t scheduler{};
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_bytes = 0;
  int current = 0;
  int threads = 0;
  int arrived = 0;
  std::uint64_t generation = 0;
  std::uint64_t progress = 0;
  std::int64_t index = 0;
  std::int64_t count = 0;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
};

thread_local Block block;

void to_scheduler(bool leaves) {
  Fiber& me = block.fibers[static_cast<std::size_t>(block.current)];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaves ? nullptr : &me.fake_stack, block.scheduler_stack,
                                 block.scheduler_bytes);
#else
  (void)leaves;
#endif
  swapcontext(&me.context, &block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
#endif
}

void to_fiber(int index) {
  block.current = index;
  Fiber& next = block.fibers[static_cast<std::size_t>(index)];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, next.stack.get(), kStackBytes);
#endif
  swapcontext(&block.scheduler, &next.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_bytes);
#endif
  block.body(block.argument);
  block.fibers[static_cast<std::size_t>(block.current)].done = true;
  ++block.progress;
  to_scheduler(true);
}

bool is_reversed() {
  const char* order = std::getenv("ONNXNORM_EMULATED_ORDER");
  return order != nullptr && std::strcmp(order, "reverse") == 0;
}

void run_block(bool reversed) {
  for (Fiber& fiber : block.fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  block.arrived = 0;
  for (Warp& warp : block.warps) warp.arrived = 0;
  const auto ordered = [reversed](int i, int n) { return reversed ? n - 1 - i : i; };
  // A warp runs on until it has to wait for others: the further ahead, the more of what is not
  // ordered by a barrier shows.
  const auto run_warp = [&](int warp) {
    bool left = true;
    for (std::uint64_t before = ~block.progress; left && block.progress != before;) {
      before = block.progress;
      left = false;
      for (int i = 0; i < kWarp; ++i) {
        const int index = warp * kWarp + ordered(i, kWarp);
        if (block.fibers[static_cast<std::size_t>(index)].done) continue;
        to_fiber(index);
        left = true;
      }
    }
    return left;
  };
  const int warps = block.threads / kWarp;
  for (bool left = true; left;) {
    const std::uint64_t before = block.progress;
    left = false;
    for (int i = 0; i < warps; ++i) left = run_warp(ordered(i, warps)) || left;
    if (left && block.progress == before) {
      throw std::logic_error("threads of block " + std::to_string(block.index) +
                             " wait for others that never come");
    }
  }
}

}  // namespace

int thread_index() { return block.current; }
int threads() { return block.threads; }
std::int64_t block_index() { return block.index; }
std::int64_t blocks() { return block.count; }

void barrier() {
  const std::uint64_t mine = block.generation;
  ++block.progress;
  if (++block.arrived == block.threads) {
    block.arrived = 0;
    ++block.generation;
    return;
  }
  while (block.generation == mine) to_scheduler(false);
}

std::uint64_t exchange(std::uint64_t bits, int lanes) {
  Warp& warp = block.warps[static_cast<std::size_t>(block.current / kWarp)];
  const int lane = block.current % kWarp;
  const std::uint64_t mine = warp.generation;
  auto& slots = warp.slots[mine % 2];
  slots[lane] = bits;
  ++block.progress;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
  }
  while (warp.generation == mine) to_scheduler(false);
  return slots[lane ^ lanes];
}

void launch(std::int64_t blocks, int threads, void (*body)(const void*), const void* argument) {
  if (blocks < 1 || threads < 1 || threads % kWarp != 0) {
    throw std::logic_error("a grid of " + std::to_string(blocks) + " blocks of " +
                           std::to_string(threads) + " threads");
  }
  const auto size = static_cast<std::size_t>(threads);
  if (block.fibers.size() < size) block.fibers = std::vector<Fiber>(size);
  block.warps.assign(size / kWarp, Warp{});
  block.threads = threads;
  block.count = blocks;
  block.body = body;
  block.argument = argument;
  const bool reversed = is_reversed();
  for (block.index = 0; block.index < blocks; ++block.index) run_block(reversed);
}

float widen(F16 value) {
  const int exponent = (value.bits >> 10) & 31;
  const int mantissa = value.bits & 1023;
  const float sign = (value.bits & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN()
                         : sign * std::numeric_limits<float>::infinity();
  }
  const int leading = exponent == 0 ? 0 : 1024;
  return sign *
         std::ldexp(static_cast<float>(leading + mantissa), (exponent == 0 ? 1 : exponent) - 25);
}

float widen(BF16 value) {
  const std::uint32_t bits = std::uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

void narrow(float value, F16* out) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  std::uint16_t bits = 0;
  if (std::isnan(value)) {
    bits = 0x7e00;
  } else if (magnitude >= 65520.0f) {  // halfway to what would be the next number
    bits = 0x7c00;
  } else if (magnitude < 0x1p-14f) {  // multiples of 2^-24
    bits = static_cast<std::uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  } else {
    int exponent = 0;
    const float fraction = std::frexp(magnitude, &exponent);  // in [1/2, 1)
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(fraction, 11)));
    bits = static_cast<std::uint16_t>(((exponent + 14) << 10) + units - 1024);
  }
  out->bits = static_cast<std::uint16_t>(sign | bits);
}

void narrow(float value, BF16* out) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) {
    out->bits = static_cast<std::uint16_t>((bits >> 16) | 0x40);
    return;
  }
  out->bits = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace onnxnorm::device::emulation
