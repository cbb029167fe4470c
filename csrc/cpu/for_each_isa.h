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

// Everything between the two is compiled for the features named. Their spelling differs: GCC's is
// unknown to Clang, which would skip it.
#define LEGO_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define LEGO_TARGET_BEGIN(features) \
  LEGO_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LEGO_TARGET_END LEGO_PRAGMA(clang attribute pop)
#else
#define LEGO_TARGET_BEGIN(features) LEGO_PRAGMA(GCC push_options) LEGO_PRAGMA(GCC target(features))
#define LEGO_TARGET_END LEGO_PRAGMA(GCC pop_options)
#endif

#define LEGO_ISA_PASS

#define LEGO_LANES 4
namespace lego::scalar {
namespace {
#include "vec.h"
#include "vec_dot.h"
#include "vec_math.h"
#include "vec_norm.h"
#include LEGO_OP_FILE
}  // namespace
}  // namespace lego::scalar
#undef LEGO_LANES

#if defined(__x86_64__)

LEGO_TARGET_BEGIN("avx2,fma,f16c")
#define LEGO_LANES 8
namespace lego::avx2 {
namespace {
#include "vec.h"
#include "vec_dot.h"
#include "vec_math.h"
#include "vec_norm.h"
#include LEGO_OP_FILE
}  // namespace
}  // namespace lego::avx2
#undef LEGO_LANES
LEGO_TARGET_END

LEGO_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define LEGO_LANES 16
namespace lego::avx512 {
namespace {
#include "vec.h"
#include "vec_dot.h"
#include "vec_math.h"
#include "vec_norm.h"
#include LEGO_OP_FILE
}  // namespace
}  // namespace lego::avx512
LEGO_TARGET_END

LEGO_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#define LEGO_HAS_DPBF16
namespace lego::avx512_bf16 {
namespace {
#include "vec.h"
#include "vec_dot.h"
#include "vec_math.h"
#include "vec_norm.h"
#include LEGO_OP_FILE
}  // namespace
}  // namespace lego::avx512_bf16
#undef LEGO_HAS_DPBF16
#undef LEGO_LANES
LEGO_TARGET_END

#endif
#undef LEGO_ISA_PASS
