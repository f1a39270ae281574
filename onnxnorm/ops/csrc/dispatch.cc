#include "dispatch.h"

#include <atomic>
#include <cstdlib>

namespace onnxnorm {
namespace {

struct Candidate {
  const Kernels* table;
  bool present;
};

// The flags with which build.py compiles each table are the features asked for here.
std::vector<Candidate> candidates() {
  std::vector<Candidate> found;
#if defined(ONNXNORM_HAVE_avx512)
  found.push_back({avx512_kernels(),
                   __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
#if defined(ONNXNORM_HAVE_avx2)
  // F16C has no name here on older compilers. Every processor with AVX2 has it.
  found.push_back(
      {avx2_kernels(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
#if defined(ONNXNORM_HAVE_neon)
  found.push_back({neon_kernels(), true});  // part of every 64-bit Arm
#endif
#if defined(ONNXNORM_HAVE_baseline)
  found.push_back({baseline_kernels(), true});
#endif
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
  for (const Candidate& candidate : candidates()) {
    if (candidate.present) usable.push_back(candidate.table);
  }
  return usable;
}

std::vector<std::string> built_kernels() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) names.emplace_back(candidate.table->name);
  return names;
}

bool select_kernels(const std::string& name) {
  for (const Kernels* table : usable_kernels()) {
    if (name == table->name) {
      chosen.store(table);
      return true;
    }
  }
  return false;
}

const Kernels& kernels() {
  const Kernels* table = chosen.load();
  if (table == nullptr) {
    const char* wanted = std::getenv("ONNXNORM_INSTRUCTION_SET");
    if (wanted == nullptr || !select_kernels(wanted)) {
      const Kernels* none = nullptr;
      chosen.compare_exchange_strong(none, usable_kernels().front());
    }
    table = chosen.load();
  }
  return *table;
}

}  // namespace onnxnorm
