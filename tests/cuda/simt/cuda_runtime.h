// A stand-in for CUDA's runtime header under which a plain C++ compiler builds csrc/cuda/*.cu, so that the kernels,
// their launches and their index arithmetic run in the tests of a machine without a GPU.
//
// A launch runs its blocks one after another and each thread of a block as a fiber. Fibers switch only at barriers and
// warp exchanges; between block barriers the warps run one after another, and the order of warps and lanes is drawn
// anew at every step (simt_seed), so that a missing barrier shows as a wrong or changing result. Shared memory is
// filled with NaN before every block. A barrier that not all threads reach, an exchange with a lane that has left and a
// launch beyond CUDA's limits are errors. What it cannot show: what the memory model allows beyond such orders,
// misaligned access, speed, and what nvcc makes of the code.
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
uint64_t* lane_slot(int lane);  // exchange slot of a lane of the running thread's warp
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
