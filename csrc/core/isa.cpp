#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace bdprune::core {
namespace {

Isa detect() {
#if BDP_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const Isa best = avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  const Isa best = Isa::kBaseline;
#endif
  const char* wanted = std::getenv("BDPRUNE_ISA");
  for (Isa lower : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (wanted && std::strcmp(wanted, isa_name(lower)) == 0 && lower < best) return lower;
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa detected = detect();
  return detected;
}

const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline"; }

}  // namespace bdprune::core
