#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <iterator>

#include "../check.h"

namespace lego {
namespace {

const char* const kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // not __builtin_cpu_supports, since Clang 14 knows no f16c there
  unsigned eax, ebx, ecx = 0, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

std::atomic<Isa>& isa_in_force() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa current_isa() { return isa_in_force().load(std::memory_order_relaxed); }

std::string choose_isa(std::string name) {
  const auto best = static_cast<int>(best_isa());
  if (name == "best") name = kNames[best];
  if (!name.empty()) {
    const auto usable = std::begin(kNames) + best + 1;
    const auto found = std::find(std::begin(kNames), usable, name);
    LEGO_CHECK_VALUE(found != usable, "cpu_isa: must be one that this CPU has, of scalar to "
                                          << kNames[best] << ", got " << name);
    isa_in_force().store(static_cast<Isa>(found - std::begin(kNames)), std::memory_order_relaxed);
  }
  return kNames[static_cast<int>(current_isa())];
}

}  // namespace lego

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&lego::choose_isa));
}
