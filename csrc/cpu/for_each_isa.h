// Compiles the kernels of one op once per instruction set, each in a namespace of its own, so that
// the choice is made at run time (LEGO_KERNEL in isa.h). An op file looks like this:
//
//   #ifdef LEGO_ISA_PASS   // compiled once per instruction set, with vec*.h in scope
//   inline void scale(float* x, int64_t size) { ... }
//   #else                  // compiled once
//   #include ...           // every header, before the kernels: none may be compiled for one ISA
//   #define LEGO_OP_FILE "scale.cpp"
//   #include "for_each_isa.h"
//   void scale_cpu(Tensor x) { LEGO_KERNEL(scale)(...); }
//   #endif

#include <cstdint>
#include <cstring>

#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LEGO_ISA_PASS

#define LEGO_LANES 4
namespace lego::scalar {
namespace {
#include "vec.h"
#include "vec_dot.h"
#include "vec_math.h"
#include LEGO_OP_FILE
}  // namespace
}  // namespace lego::scalar
#undef LEGO_LANES

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define LEGO_LANES 8
namespace lego::avx2 {
namespace {
#include "vec.h"
#include "vec_dot.h"
#include "vec_math.h"
#include LEGO_OP_FILE
}  // namespace
}  // namespace lego::avx2
#undef LEGO_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define LEGO_LANES 16
namespace lego::avx512 {
namespace {
#include "vec.h"
#include "vec_dot.h"
#include "vec_math.h"
#include LEGO_OP_FILE
}  // namespace
}  // namespace lego::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#define LEGO_HAS_DPBF16
namespace lego::avx512_bf16 {
namespace {
#include "vec.h"
#include "vec_dot.h"
#include "vec_math.h"
#include LEGO_OP_FILE
}  // namespace
}  // namespace lego::avx512_bf16
#undef LEGO_HAS_DPBF16
#undef LEGO_LANES
#pragma GCC pop_options

#endif
#undef LEGO_ISA_PASS
