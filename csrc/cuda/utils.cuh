// Shared by the CUDA kernels: the caller's stream, a checked launch, 16-byte vectors and warp sums.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../common.h"

namespace bdprune::cuda {

using torch::stable::accelerator::DeviceGuard;

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kVectorBytes = 16;  // widest load of one thread

// PyTorch's current stream on the tensor's device. Launching on another stream breaks CUDA graphs and user streams.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches a kernel and throws if the launch fails. Arguments are converted to the kernel's own parameter types.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

// The dispatcher only requires one argument on the device; a kernel needs all of them there.
inline void check_same_device(const Tensor& tensor, const Tensor& other, const char* name) {
  BDP_CHECK(tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
            " must be on the same CUDA device as the other tensors");
}

inline Tensor empty_on_device(int64_t numel, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, {numel}, dtype);
}

// The type to compute in: float64 work stays in float64; every narrower dtype is exact in float32.
template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// kWidth elements that are loaded or stored in one aligned access.
template <typename scalar_t, int kWidth>
struct alignas(sizeof(scalar_t) * kWidth) Vector {
  scalar_t value[kWidth];
};

// Sum over the lanes of a warp, on every lane. The order is fixed, so the result is reproducible.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

}  // namespace bdprune::cuda
