#pragma once

#include <string>
#include <utility>

namespace lego {

// Instruction sets a kernel is compiled for, each a namespace of for_each_isa.h. They are ordered:
// a CPU that has one has those before it.
enum class Isa { scalar, avx2, avx512, avx512_bf16 };

// The best one this CPU has, unless choose_isa named another.
Isa current_isa();

// Makes every kernel run on the named instruction set from now on; "" keeps the one in force, "best"
// goes back to the CPU's best. Returns the one in force. A name that is unknown, or that this CPU
// lacks, is a std::invalid_argument, and nothing changes.
std::string choose_isa(std::string name);

}  // namespace lego

// The kernel of that name for the instruction set in force; all four have one type.
#if defined(__x86_64__)
#define LEGO_KERNEL(name)                                                                            \
  [] {                                                                                               \
    decltype(&lego::scalar::name) const kernels[] = {&lego::scalar::name, &lego::avx2::name,         \
                                                     &lego::avx512::name, &lego::avx512_bf16::name}; \
    return kernels[static_cast<int>(lego::current_isa())];                                           \
  }()
#else
#define LEGO_KERNEL(name) &lego::scalar::name
#endif
