// channel_scale and its backward on CUDA: y[n, c, *] = mask[c] * z[n, c, *], one read and one write of the map. A stack
// z[g, n, c, *] with mask[g, c] also takes one launch, and each of its maps gets the same bits as alone.
//
// Both memory orders are read in place: NCHW as rows of one channel, channels_last as rows of all channels. Rows of
// whole 16-byte vectors are moved as vectors. The mask gradient, the sum over samples and positions of grad * z, is
// computed in float64 in two stages with a split that depends only on the shape: no atomics, so runs are reproducible
// bit for bit.
#include <algorithm>
#include <limits>

#include "partial_sums.cuh"

namespace bdprune::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocksWanted = 1024;  // fills any current device, and is fixed so that sums don't depend on it
constexpr int64_t kWorkPerThread = 8;    // below this number of vectors a further split costs more than it saves

// y = mask * z, one vector per thread. index_t counts vectors and is 32-bit if possible, for cheap divisions.
template <typename scalar_t, typename index_t, int kWidth, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const scalar_t* __restrict__ z, const compute_t<scalar_t>* __restrict__ mask, scalar_t* __restrict__ y,
                 index_t num_vectors, index_t vectors_per_row, index_t channels, index_t rows_per_map) {
  using vector_t = Vector<scalar_t, kWidth>;
  const index_t vector = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (vector >= num_vectors) return;
  const index_t row = vector / vectors_per_row;
  const index_t in_mask = row / rows_per_map * channels;
  const index_t first = in_mask + (kChannelsLast ? (vector - row * vectors_per_row) * kWidth : row % channels);
  vector_t data = reinterpret_cast<const vector_t*>(z)[vector];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const compute_t<scalar_t> factor = mask[kChannelsLast ? first + i : first];
    data.value[i] = static_cast<scalar_t>(static_cast<compute_t<scalar_t>>(data.value[i]) * factor);
  }
  reinterpret_cast<vector_t*>(y)[vector] = data;
}

// Stage one of the backward on NCHW. Block (map and channel, split) processes its share of the channel's vectors,
// counted over the samples of the map: grad_z = mask * grad if requested, and partial[split, map, channel] = sum of
// grad * z.
template <typename scalar_t, typename index_t, int kWidth, bool kNeedZ>
__global__ void __launch_bounds__(kThreads)
    backward_rows_kernel(const scalar_t* __restrict__ grad, const scalar_t* __restrict__ z,
                         const compute_t<scalar_t>* __restrict__ mask, scalar_t* __restrict__ grad_z,
                         double* __restrict__ partial, index_t samples, index_t vectors_per_row, index_t channels,
                         index_t vectors_per_split) {
  using vector_t = Vector<scalar_t, kWidth>;
  const index_t map = blockIdx.x / channels, channel = blockIdx.x - map * channels;
  const index_t total = samples * vectors_per_row;
  const index_t begin = blockIdx.y * vectors_per_split;
  const index_t end = total - begin < vectors_per_split ? total : begin + vectors_per_split;
  const compute_t<scalar_t> factor = mask[blockIdx.x];
  double sum = 0;
  for (index_t k = begin + threadIdx.x; k < end; k += kThreads) {
    const index_t sample = k / vectors_per_row;
    const index_t row = (map * samples + sample) * channels + channel;
    const index_t at = row * vectors_per_row + (k - sample * vectors_per_row);
    vector_t g = reinterpret_cast<const vector_t*>(grad)[at];
    const vector_t data = reinterpret_cast<const vector_t*>(z)[at];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum = fma(static_cast<double>(g.value[i]), static_cast<double>(data.value[i]), sum);
      g.value[i] = static_cast<scalar_t>(static_cast<compute_t<scalar_t>>(g.value[i]) * factor);
    }
    if constexpr (kNeedZ) reinterpret_cast<vector_t*>(grad_z)[at] = g;
  }

  __shared__ double warp_sums[kThreads / kWarpSize];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarpSize; ++warp) sum += warp_sums[warp];
  partial[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

// Stage one of the backward on channels_last. A block is blockDim.x vectors of channels wide and blockDim.y positions
// high, kThreads in all; block (map and columns, split) processes its share of the map's positions. Outputs as above.
template <typename scalar_t, typename index_t, int kWidth, bool kNeedZ>
__global__ void __launch_bounds__(kThreads)
    backward_columns_kernel(const scalar_t* __restrict__ grad, const scalar_t* __restrict__ z,
                            const compute_t<scalar_t>* __restrict__ mask, scalar_t* __restrict__ grad_z,
                            double* __restrict__ partial, index_t positions, index_t vectors_per_row,
                            index_t positions_per_split, index_t blocks_per_map) {
  using vector_t = Vector<scalar_t, kWidth>;
  const index_t map = blockIdx.x / blocks_per_map;
  const index_t column = (blockIdx.x - map * blocks_per_map) * blockDim.x + threadIdx.x;
  const bool inside = column < vectors_per_row;
  const index_t begin = blockIdx.y * positions_per_split;
  const index_t end = positions - begin < positions_per_split ? positions : begin + positions_per_split;
  double sum[kWidth] = {};
  compute_t<scalar_t> factor[kWidth] = {};
  if (inside) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) factor[i] = mask[(map * vectors_per_row + column) * kWidth + i];
  }
  for (index_t position = begin + threadIdx.y; inside && position < end; position += blockDim.y) {
    const index_t at = (map * positions + position) * vectors_per_row + column;
    vector_t g = reinterpret_cast<const vector_t*>(grad)[at];
    const vector_t data = reinterpret_cast<const vector_t*>(z)[at];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum[i] = fma(static_cast<double>(g.value[i]), static_cast<double>(data.value[i]), sum[i]);
      g.value[i] = static_cast<scalar_t>(static_cast<compute_t<scalar_t>>(g.value[i]) * factor[i]);
    }
    if constexpr (kNeedZ) reinterpret_cast<vector_t*>(grad_z)[at] = g;
  }

  __shared__ double sums[kWidth][kThreads];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums[i][threadIdx.y * blockDim.x + threadIdx.x] = sum[i];
  __syncthreads();
  if (threadIdx.y != 0 || !inside) return;
  const int64_t channels = static_cast<int64_t>(vectors_per_row) * kWidth;
  const int64_t maps = gridDim.x / blocks_per_map;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    double total = sums[i][threadIdx.x];
    for (unsigned row = 1; row < blockDim.y; ++row) total += sums[i][row * blockDim.x + threadIdx.x];
    partial[(blockIdx.y * maps + map) * channels + static_cast<int64_t>(column) * kWidth + i] = total;
  }
}

// A stack of maps as a matrix of consecutive rows: for each map N*C rows of H*W, or N*H*W rows of C in channels_last.
struct Rows {
  int64_t maps, samples, channels, positions;
  bool channels_last;

  explicit Rows(const Stack& stack)
      : maps(stack.size),
        samples(stack.samples()),
        channels(stack.map.channels),
        positions(stack.map.positions),
        channels_last(stack.map.channels_fastest || stack.map.positions == 1) {}

  int64_t numel() const { return maps * samples * channels * positions; }
  int64_t row_length() const { return channels_last ? channels : positions; }
  int64_t rows_per_map() const { return samples * (channels_last ? positions : channels); }
};

bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kVectorBytes == 0; }

// Calls fn(index type, vector width) for a map of scalar_t. The 32-bit range is halved so that the excess of the last
// block can't wrap.
template <typename scalar_t, typename Fn>
void dispatch_width(const Rows& rows, bool all_aligned, Fn&& fn) {
  constexpr int kWidth = kVectorBytes / sizeof(scalar_t);
  constexpr int64_t kNarrow = std::numeric_limits<int32_t>::max() / 2;
  if (all_aligned && rows.row_length() % kWidth == 0 && rows.numel() / kWidth < kNarrow) {
    fn(Type<uint32_t>{}, std::integral_constant<int, kWidth>{});
  } else if (rows.numel() < kNarrow) {
    fn(Type<uint32_t>{}, std::integral_constant<int, 1>{});
  } else {
    fn(Type<int64_t>{}, std::integral_constant<int, 1>{});
  }
}

// Mask in the compute dtype for maps of `dtype`, dense.
Tensor mask_for(const Tensor& mask, ScalarType dtype) {
  const ScalarType wanted = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(mask.scalar_type() == wanted ? mask : torch::stable::to(mask, wanted));
}

void check_arguments(const Tensor& z, const Tensor& mask) {
  check_same_device(mask, z, "mask");
  BDP_CHECK(is_floating(mask.scalar_type()), "mask must have a floating dtype");
  BDP_CHECK(mask.dim() == 1 || mask.dim() == 2, "mask must be [C] or [G, C], got ", mask.dim(), " dimensions");
  BDP_CHECK(z.dim() > mask.dim(), "z must be [N, C, *] for a mask [C] and [G, N, C, *] for [G, C], got ", z.dim(),
            " dimensions for ", mask.dim());
  const int64_t channels = z.size(mask.dim()), maps = mask.dim() == 2 ? z.size(0) : 1;
  BDP_CHECK(mask.size(mask.dim() - 1) == channels && mask.numel() == maps * channels,
            "mask must have one entry per channel: ", maps, " x ", channels, " channels, got ", mask.numel());
}

void scale_into(Tensor& y, const Tensor& z, const Rows& rows, const Tensor& mask) {
  const cudaStream_t stream = current_stream(z);
  dispatch_floating(z.scalar_type(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    dispatch_width<scalar_t>(rows, is_aligned(z) && is_aligned(y), [&](auto index, auto width) {
      using index_t = typename decltype(index)::type;
      constexpr int kWidth = decltype(width)::value;
      auto kernel = rows.channels_last ? scale_kernel<scalar_t, index_t, kWidth, true>
                                       : scale_kernel<scalar_t, index_t, kWidth, false>;
      const int64_t vectors = rows.numel() / kWidth;
      launch(kernel, dim3(ceil_div(vectors, kThreads)), dim3(kThreads), stream, z.data_ptr(), mask.data_ptr(),
             y.data_ptr(), vectors, rows.row_length() / kWidth, rows.channels, rows.rows_per_map());
    });
  });
}

Tensor channel_scale(const Tensor& z, const Tensor& mask) {
  check_arguments(z, mask);
  const DeviceGuard guard(z.get_device_index());
  const Stack stack = as_stack(z, mask.dim() == 2);
  Tensor y = torch::stable::empty_like(stack.map.tensor);
  if (z.numel() > 0) scale_into(y, stack.map.tensor, Rows(stack), mask_for(mask, z.scalar_type()));
  return in_shape_of(z, y);
}

// Stage one in z's layout; returns partial [splits, G, C]. The splits are those of one map, so that a stack gives the
// bits of its maps.
template <typename scalar_t, typename index_t, int kWidth, bool kNeedZ>
Tensor reduce_rows(const Tensor& z, const Rows& rows, const Tensor& grad, const Tensor& mask, const Tensor& grad_z) {
  const int64_t per_row = rows.row_length() / kWidth, sums = rows.maps * rows.channels;
  const cudaStream_t stream = current_stream(z);
  if (!rows.channels_last) {
    const int64_t vectors = rows.samples * per_row;  // of one channel of one map
    const int64_t wanted = std::min(kBlocksWanted / rows.channels, vectors / (kThreads * kWorkPerThread));
    const int64_t per_split = ceil_div(vectors, std::max<int64_t>(wanted, 1));
    const int64_t splits = ceil_div(vectors, per_split);
    Tensor partial = empty_on_device(splits * sums, ScalarType::Double, z);
    launch(backward_rows_kernel<scalar_t, index_t, kWidth, kNeedZ>, dim3(sums, splits), dim3(kThreads), stream,
           grad.data_ptr(), z.data_ptr(), mask.data_ptr(), grad_z.data_ptr(), partial.data_ptr(), rows.samples, per_row,
           rows.channels, per_split);
    return partial;
  }
  unsigned wide = 1;
  while (wide < kWarpSize && wide < per_row) wide *= 2;
  const unsigned high = kThreads / wide;
  const int64_t groups = ceil_div(per_row, wide);
  const int64_t positions = rows.samples * rows.positions;
  const int64_t wanted = std::min(kBlocksWanted / groups, positions / (high * kWorkPerThread));
  const int64_t per_split = ceil_div(positions, std::max<int64_t>(wanted, 1));
  const int64_t splits = ceil_div(positions, per_split);
  Tensor partial = empty_on_device(splits * sums, ScalarType::Double, z);
  launch(backward_columns_kernel<scalar_t, index_t, kWidth, kNeedZ>, dim3(rows.maps * groups, splits), dim3(wide, high),
         stream, grad.data_ptr(), z.data_ptr(), mask.data_ptr(), grad_z.data_ptr(), partial.data_ptr(), positions,
         per_row, per_split, groups);
  return partial;
}

std::tuple<Tensor, Tensor> channel_scale_backward(const Tensor& grad, const Tensor& z, const Tensor& mask, bool need_z,
                                                  bool need_mask) {
  check_arguments(z, mask);
  check_same_device(grad, z, "grad");
  BDP_CHECK(grad.scalar_type() == z.scalar_type(), "grad must have the dtype of z");
  BDP_CHECK(grad.sizes().vec() == z.sizes().vec(), "grad must have the shape of z");
  const DeviceGuard guard(z.get_device_index());
  const Stack stack = as_stack(z, mask.dim() == 2);
  const Tensor& dense = stack.map.tensor;
  Tensor grad_z = need_z ? torch::stable::empty_like(dense) : empty_on_device(0, z.scalar_type(), z);
  Tensor grad_mask =
      need_mask ? torch::stable::new_zeros(mask, mask.sizes()) : empty_on_device(0, mask.scalar_type(), mask);
  const Tensor shaped = need_z ? in_shape_of(z, grad_z) : grad_z;
  if (z.numel() == 0 || (!need_z && !need_mask)) return {shaped, grad_mask};

  const Rows rows(stack);
  const Tensor dense_grad = in_layout_of(stack.map, as_stack(grad, mask.dim() == 2).map);
  const Tensor factors = mask_for(mask, z.scalar_type());
  if (!need_mask) {
    scale_into(grad_z, dense_grad, rows, factors);
    return {shaped, grad_mask};
  }
  dispatch_floating(z.scalar_type(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const bool all_aligned = is_aligned(dense) && is_aligned(dense_grad) && (!need_z || is_aligned(grad_z));
    dispatch_width<scalar_t>(rows, all_aligned, [&](auto index, auto width) {
      using index_t = typename decltype(index)::type;
      constexpr int kWidth = decltype(width)::value;
      auto reduce =
          need_z ? reduce_rows<scalar_t, index_t, kWidth, true> : reduce_rows<scalar_t, index_t, kWidth, false>;
      merge_into(grad_mask, reduce(dense, rows, dense_grad, factors, grad_z));
    });
  });
  return {shaped, grad_mask};
}

}  // namespace
}  // namespace bdprune::cuda

STABLE_TORCH_LIBRARY_IMPL(bdprune, CUDA, m)
{
  m.impl("channel_scale", TORCH_BOX(&bdprune::cuda::channel_scale));
  m.impl("channel_scale_backward", TORCH_BOX(&bdprune::cuda::channel_scale_backward));
}
