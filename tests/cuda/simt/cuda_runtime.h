// Replaces CUDA's runtime header, so that a plain C++ compiler can build csrc/cuda/*.cu. Tests then run the kernels,
// their launches and their index arithmetic on machines without a GPU.
//
// A launch runs its blocks one after another and each thread of a block as a fiber. Fibers switch only at barriers and
// warp exchanges; between block barriers the warps run one after another. The order of warps and lanes is drawn
// anew at every step (simt_seed), so that a missing barrier gives a wrong or changing result. Shared memory is
// filled with NaN before every block. Errors: a barrier that not all threads reach, an exchange with a lane that has
// returned, a launch beyond CUDA's limits. Not covered: other orders that the memory model allows, misaligned access,
// speed, and the code that nvcc generates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace simt {

enum class Scope { kWarp, kBlock };

// Runs `thread` once per thread of the grid.
cudaError_t run_grid(dim3 grid, dim3 block, const std::function<void()>& thread);
void wait(Scope scope);
uint64_t* lane_slot(int lane);  // the kSlots exchange slots of a lane in the warp of the running thread
constexpr int kSlots = 3;
int lane();

template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(lane_slot(lane()), &value, sizeof(T));
  wait(Scope::kWarp);
  std::memcpy(&value, lane_slot(source), sizeof(T));
  wait(Scope::kWarp);
  return value;
}

// The operands of a warp for mma.sync: registers of A and B by lane. The positions of matrix elements follow the PTX
// ISA element by element; the kernels compute them lane by lane.
struct Fragments {
  uint32_t a[32][4], b[32][2];

  Fragments(const uint32_t (&own_a)[4], const uint32_t (&own_b)[2]) {
    std::memcpy(lane_slot(lane()), own_a, sizeof own_a);
    std::memcpy(lane_slot(lane()) + 2, own_b, sizeof own_b);
    wait(Scope::kWarp);
    for (int l = 0; l < 32; ++l) {
      std::memcpy(a[l], lane_slot(l), sizeof own_a);
      std::memcpy(b[l], lane_slot(l) + 2, sizeof own_b);
    }
    wait(Scope::kWarp);
  }
};

// c += A * B for the running lane's four elements of C [16, 8]; `a(row, k)` and `b(k, column)` give the operands.
template <typename A, typename B>
void multiply_fragment(float (&c)[4], int depth, A&& a, B&& b) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      if (row % 8 * 4 + column / 2 != lane()) continue;
      double sum = c[row / 8 * 2 + column % 2];
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(a(row, k)) * static_cast<double>(b(k, column));
      c[row / 8 * 2 + column % 2] = static_cast<float>(sum);
    }
  }
}

inline void mma_tf32(float (&c)[4], const uint32_t (&own_a)[4], const uint32_t (&own_b)[2]) {
  const Fragments warp(own_a, own_b);
  const auto value = [](uint32_t bits) {
    bits &= 0xffffe000u;  // tensor cores ignore the other bits
    float number;
    std::memcpy(&number, &bits, sizeof bits);
    return number;
  };
  multiply_fragment(
      c, 8, [&](int row, int k) { return value(warp.a[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]); },
      [&](int k, int column) { return value(warp.b[column * 4 + k % 4][k / 4]); });
}

template <typename Widen>
void mma_16bit(float (&c)[4], const uint32_t (&own_a)[4], const uint32_t (&own_b)[2], Widen&& widen) {
  const Fragments warp(own_a, own_b);
  const auto half = [&](uint32_t bits, int k) { return widen(static_cast<uint16_t>(bits >> (k % 2 * 16))); };
  multiply_fragment(
      c, 16, [&](int row, int k) { return half(warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k); },
      [&](int k, int column) { return half(warp.b[column * 4 + k % 8 / 2][k / 8], k); });
}

}  // namespace simt

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { simt::wait(simt::Scope::kBlock); }
inline void __syncwarp(unsigned = 0xffffffffu) { simt::wait(simt::Scope::kWarp); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simt::exchange(value, simt::lane() ^ mask);
}

using std::fabs, std::fma, std::fmax, std::ilogb, std::isfinite, std::ldexp, std::max, std::min, std::sqrt;

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  return simt::run_grid(config->gridDim, config->blockDim, [&] { kernel(static_cast<Params>(args)...); });
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
