// One mma.sync: c += a * b on a warp's fragments, with float32 sums; csrc/core/implicit_gemm.h defines the layout of
// the fragments.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common.h"

namespace bdprune::cuda {

#if defined(__CUDACC__)

// A [16, 8] and B [8, 8] in TF32: float32 bits, of which the low 13 are ignored.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A [16, 16] and B [16, 8] of 16-bit numbers, two in a register.
__device__ __forceinline__ void mma_16bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                          torch::headeronly::Half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                          torch::headeronly::BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else  // the emulator of tests/cuda/simt

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { simt::mma_tf32(c, a, b); }

template <typename scalar_t>
void mma_16bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], scalar_t) {
  simt::mma_16bit(c, a, b, [](uint16_t bits) {
    scalar_t value;
    std::memcpy(&value, &bits, sizeof bits);
    return static_cast<float>(value);
  });
}

#endif

}  // namespace bdprune::cuda
