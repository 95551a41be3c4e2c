// Run-time choice of the instruction set. Kernels are written once with GCC vector extensions as always-inline
// templates and compiled into one entry point per instruction set: a wheel built for the baseline uses AVX-512 if the
// CPU has it. (target_clones can't do this: it does not reach into templates or inlined callees.)
#pragma once

#include "macros.h"

namespace bdprune::core {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best set this CPU has; BDPRUNE_ISA=baseline|avx2|avx512 lowers it (read once, for tests and comparisons).
Isa isa();

const char* isa_name(Isa isa);

}  // namespace bdprune::core

#if defined(__x86_64__)
#define BDP_X86 1
#define BDP_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define BDP_TARGET_AVX512 __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))
#else
#define BDP_X86 0
#endif
