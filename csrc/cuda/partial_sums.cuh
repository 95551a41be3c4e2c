// The second stage of sums computed by several blocks: adds the parts in an order that depends only on the shape.
#pragma once

#include "utils.cuh"

namespace bdprune::cuda {
namespace {

constexpr int kMergeHigh = 16;  // threads for the parts of one sum

// sums[i] = sum of partial[part, i] over the parts. A block is kWarpSize sums wide and kMergeHigh threads high.
template <typename sum_t>
__global__ void __launch_bounds__(kWarpSize* kMergeHigh)
    merge_kernel(const double* __restrict__ partial, sum_t* __restrict__ sums, int64_t parts, int64_t count) {
  __shared__ double shares[kMergeHigh][kWarpSize];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  double sum = 0;
#pragma unroll 4
  for (int64_t part = threadIdx.y; i < count && part < parts; part += kMergeHigh) sum += partial[part * count + i];
  shares[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= count) return;
  for (int high = 1; high < kMergeHigh; ++high) sum += shares[high][threadIdx.x];
  sums[i] = static_cast<sum_t>(sum);
}

// partial [parts, *] into sums [*] of any floating dtype.
void merge_into(Tensor& sums, const Tensor& partial) {
  const int64_t count = sums.numel();
  if (count == 0) return;
  dispatch_floating(sums.scalar_type(), [&](auto type) {
    using sum_t = typename decltype(type)::type;
    launch(merge_kernel<sum_t>, dim3(ceil_div(count, kWarpSize)), dim3(kWarpSize, kMergeHigh), current_stream(sums),
           static_cast<const double*>(partial.data_ptr()), static_cast<sum_t*>(sums.data_ptr()),
           partial.numel() / count, count);
  });
}

}  // namespace
}  // namespace bdprune::cuda
