// channel_moments_update_ on CUDA: adds one batch of feature maps x [N, C, *] to the running moments of its channels,
// or a batch of each of G maps x [G, N, C, *] in the same launches.
//
// Cross moments: the C x C matrix is divided into tiles of kTile x kTile, and only those on and above the diagonal are
// computed; each is split along the N * P positions among blocks. A block subtracts the shift while it stages a slab of
// positions in shared memory, directly from NCHW or channels_last, and computes products in IEEE float32, or in float64
// for float64 maps. Optionally it uses tensor cores, with each factor as the sum of two TF32 numbers and each product
// as three of the four between them (3xTF32), which equals float32 up to the last bits. Runs of kRun positions are
// summed in that type and then added in float64. A second kernel adds the splits in order and writes both triangles.
// Sums and norms: one warp (or, in channels_last, one column of threads) per sample and channel, in float64, then one
// warp per channel over the samples. The splits depend only on the shape, and no sum uses atomics: results are
// reproducible bit for bit.
#include <algorithm>
#include <vector>

#include "../core/implicit_gemm.h"
#include "mma.cuh"
#include "utils.cuh"

namespace bdprune::cuda {
namespace {

constexpr int kTile = 64;          // channels along either side of a tile
constexpr int kSlab = 32;          // positions staged at a time
constexpr int kPitch = kTile + 4;  // row pitch of a slab: keeps 16-byte reads aligned and spreads the banks
constexpr int kRun = 128;          // positions summed before the float64 accumulators take over
constexpr int kShortestSplit = 4 * kRun;
constexpr int kThreads = 256;  // 16 x 16 threads, each with kMicro x kMicro entries of the tile
constexpr int kMicro = kTile / 16;
constexpr int kEntries = kMicro * kMicro;  // of a thread
constexpr int64_t kBlocksWanted = 1024;
constexpr int64_t kTileEntries = kTile * kTile;

// The offset of x[sample, channel, position]; either channel or position has stride 1. The samples of map g of a stack
// follow those of map g - 1, and `samples` counts those of one map.
struct MapLayout {
  int64_t maps, samples, channels, positions;
  int64_t sample_stride, channel_stride, position_stride;
};

// Row and column of the tile with the given number, counting the upper triangle of a grid of `side` tiles by rows.
struct TilePlace {
  int row, column;
};

__device__ inline TilePlace place_of_tile(int number, int side) {
  int row = 0;
  while (number >= side - row) number -= side - row++;
  return {row, row + number};
}

// The position that a thread stages, advancing by whole slabs. In NCHW it is a sample and a position within it; in
// channels_last the positions of all samples form one axis.
struct Cursor {
  int64_t sample, position;

  __device__ Cursor(int64_t at, const MapLayout& layout)
      : sample(at / layout.positions), position(at - sample * layout.positions) {}

  __device__ __forceinline__ void advance(const MapLayout& layout) {
    position += kSlab;
    if (position < layout.positions) return;
    const int64_t crossed = position / layout.positions;
    sample += crossed;
    position -= crossed * layout.positions;
  }
};

// Stages positions [start, start + kSlab) of channels [first, first + kTile), shifted; values outside become 0.
// Adjacent threads read adjacent addresses: positions in NCHW, channels in channels_last.
template <typename scalar_t, typename math_t, bool kChannelsLast>
__device__ __forceinline__ void stage_slab(math_t (&slab)[kSlab][kPitch], const scalar_t* __restrict__ x,
                                           const MapLayout& layout, const Cursor& cursor, const math_t (&shift)[kTile],
                                           int64_t first, int64_t start, int64_t end) {
  if constexpr (kChannelsLast) {
    const int c = threadIdx.x % kTile, k0 = threadIdx.x / kTile;
    const bool inside = first + c < layout.channels;
    const scalar_t* row = x + (start + k0) * layout.position_stride + first + c;
#pragma unroll
    for (int k = 0; k < kSlab; k += kThreads / kTile) {
      const bool valid = inside && start + k0 + k < end;
      slab[k0 + k][c] = valid ? static_cast<math_t>(row[k * layout.position_stride]) - shift[c] : math_t(0);
    }
  } else {
    const int k = threadIdx.x % kSlab, c0 = threadIdx.x / kSlab;
    const bool inside = start + k < end;
    const scalar_t* column =
        x + cursor.sample * layout.sample_stride + cursor.position + (first + c0) * layout.channel_stride;
#pragma unroll 4
    for (int c = 0; c < kTile; c += kThreads / kSlab) {
      const bool valid = inside && first + c0 + c < layout.channels;
      slab[k][c0 + c] = valid ? static_cast<math_t>(column[c * layout.channel_stride]) - shift[c0 + c] : math_t(0);
    }
  }
}

// The position of entry e of a thread in the tile. On tensor cores a warp has 32 x 16 entries of it: 2 x 2 fragments.
template <bool kTensor>
__device__ __forceinline__ core::Place entry_place(int e) {
  const int thread = threadIdx.x;
  if constexpr (kTensor) {
    const int warp = thread / kWarpSize;
    const core::Place place = core::c_place(thread % kWarpSize, e % 4);
    return {warp / 4 * 32 + e / 8 * 16 + place.row, warp % 4 * 16 + e / 4 % 2 * 8 + place.column};
  } else {
    return {thread / 16 * kMicro + e / kMicro, thread % 16 * kMicro + e % kMicro};
  }
}

// run += the products of a slab, in the compute type.
template <typename math_t>
__device__ __forceinline__ void multiply_exactly(const math_t (&rows)[kSlab][kPitch],
                                                 const math_t (&columns)[kSlab][kPitch], math_t (&run)[kEntries]) {
  const core::Place first = entry_place<false>(0);
#pragma unroll 8
  for (int k = 0; k < kSlab; ++k) {
    const auto a = *reinterpret_cast<const Vector<math_t, kMicro>*>(&rows[k][first.row]);
    const auto b = *reinterpret_cast<const Vector<math_t, kMicro>*>(&columns[k][first.column]);
#pragma unroll
    for (int e = 0; e < kEntries; ++e) run[e] = fma(a.value[e / kMicro], b.value[e % kMicro], run[e]);
  }
}

// A float32 as the sum of two TF32 numbers, up to its last two or three bits.
__device__ __forceinline__ void split_tf32(float value, uint32_t& high, uint32_t& low) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  high = core::round_to_tf32(bits);
  float part;
  memcpy(&part, &high, sizeof part);
  part = value - part;
  memcpy(&bits, &part, sizeof bits);
  low = core::round_to_tf32(bits);
}

// The same by 3xTF32.
__device__ __forceinline__ void multiply_tf32x3(const float (&rows)[kSlab][kPitch],
                                                const float (&columns)[kSlab][kPitch], float (&run)[kEntries]) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int first_row = warp / 4 * 32, first_column = warp % 4 * 16;
  float sums[2][2][4];
#pragma unroll
  for (int e = 0; e < kEntries; ++e) sums[e / 8][e / 4 % 2][e % 4] = run[e];
#pragma unroll 2
  for (int k = 0; k < kSlab; k += 8) {
    uint32_t a[2][2][4], b[2][2][2];  // high and low part, fragment, element
#pragma unroll
    for (int f = 0; f < 2; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const core::Place at = core::a_place_k8(lane, i);
        split_tf32(rows[k + at.column][first_row + 16 * f + at.row], a[0][f][i], a[1][f][i]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const core::Place at = core::b_place_k8(lane, i);
        split_tf32(columns[k + at.row][first_column + 8 * f + at.column], b[0][f][i], b[1][f][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        mma_tf32(sums[i][j], a[1][i], b[0][j]);
        mma_tf32(sums[i][j], a[0][i], b[1][j]);
        mma_tf32(sums[i][j], a[0][i], b[0][j]);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kEntries; ++e) run[e] = sums[e / 8][e / 4 % 2][e % 4];
}

// Block (map and tile, split): partial[split, map, tile] = sum over the split's positions of (x_i - s_i)(x_j - s_j),
// float64.
template <typename scalar_t, bool kChannelsLast, bool kTensor>
__global__ void __launch_bounds__(kThreads, std::is_same_v<scalar_t, double> ? 1 : 2)
    cross_kernel(const scalar_t* __restrict__ x, MapLayout layout, const double* __restrict__ shift,
                 double* __restrict__ partial, int64_t positions_per_split, int tiles) {
  using math_t = compute_t<scalar_t>;
  alignas(Vector<math_t, kMicro>) __shared__ math_t rows[kSlab][kPitch];
  alignas(Vector<math_t, kMicro>) __shared__ math_t columns[kSlab][kPitch];
  __shared__ math_t row_shift[kTile];
  __shared__ math_t column_shift[kTile];
  const int map = blockIdx.x / tiles;
  x += map * layout.samples * layout.sample_stride;
  shift += map * layout.channels;
  const TilePlace tile =
      place_of_tile(blockIdx.x - map * tiles, static_cast<int>((layout.channels + kTile - 1) / kTile));
  const int64_t first_row = static_cast<int64_t>(tile.row) * kTile;
  const int64_t first_column = static_cast<int64_t>(tile.column) * kTile;
  const bool diagonal = tile.row == tile.column;
  const int64_t total = layout.samples * layout.positions;
  const int64_t begin = blockIdx.y * positions_per_split;
  const int64_t end = total - begin < positions_per_split ? total : begin + positions_per_split;
  if (threadIdx.x < kTile) {
    const int64_t row = first_row + threadIdx.x, column = first_column + threadIdx.x;
    row_shift[threadIdx.x] = row < layout.channels ? static_cast<math_t>(shift[row]) : math_t(0);
    column_shift[threadIdx.x] = column < layout.channels ? static_cast<math_t>(shift[column]) : math_t(0);
  }
  __syncthreads();

  math_t run[kEntries] = {};
  double sum[kEntries] = {};
  Cursor cursor(begin + threadIdx.x % kSlab, layout);
  for (int64_t start = begin; start < end; start += kSlab) {
    stage_slab<scalar_t, math_t, kChannelsLast>(rows, x, layout, cursor, row_shift, first_row, start, end);
    if (!diagonal) {
      stage_slab<scalar_t, math_t, kChannelsLast>(columns, x, layout, cursor, column_shift, first_column, start, end);
    }
    cursor.advance(layout);
    __syncthreads();
    const math_t(&others)[kSlab][kPitch] = diagonal ? rows : columns;
    if constexpr (kTensor) {
      multiply_tf32x3(rows, others, run);
    } else {
      multiply_exactly(rows, others, run);
    }
    __syncthreads();
    const bool last = start + kSlab >= end;
    if (last || (start - begin) % kRun == kRun - kSlab) {
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        sum[e] += static_cast<double>(run[e]);
        run[e] = 0;
      }
    }
  }

  double* out = partial + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kTileEntries;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const core::Place place = entry_place<kTensor>(e);
    out[place.row * kTile + place.column] = sum[e];
  }
}

// cross += partial, the splits in order; one block per map and tile, both triangles.
__global__ void __launch_bounds__(kThreads)
    merge_cross_kernel(const double* __restrict__ partial, double* __restrict__ cross, int64_t channels, int64_t splits,
                       int tiles) {
  const int map = blockIdx.x / tiles;
  cross += map * channels * channels;
  const TilePlace tile = place_of_tile(blockIdx.x - map * tiles, static_cast<int>((channels + kTile - 1) / kTile));
  for (int entry = threadIdx.x; entry < kTileEntries; entry += kThreads) {
    const int64_t row = static_cast<int64_t>(tile.row) * kTile + entry / kTile;
    const int64_t column = static_cast<int64_t>(tile.column) * kTile + entry % kTile;
    if (row >= channels || column >= channels) continue;
    // In 3xTF32, (i, j) and (j, i) of a tile on the diagonal are summed in different orders: use one for both.
    const int source = row > column ? entry % kTile * kTile + entry / kTile : entry;
    double sum = 0;
    for (int64_t split = 0; split < splits; ++split) {
      sum += partial[(split * gridDim.x + blockIdx.x) * kTileEntries + source];
    }
    cross[row * channels + column] += sum;
    if (tile.row != tile.column) cross[column * channels + row] += sum;
  }
}

// The index of channel c and sample n, counted over all maps, in the sums below: [map, channel, sample of the map].
__device__ inline int64_t place_of_sum(int64_t sample, int64_t channel, const MapLayout& layout) {
  const int64_t map = sample / layout.samples;
  return (map * layout.channels + channel) * layout.samples + sample - map * layout.samples;
}

// NCHW, one warp per sample and channel: sums[g, c, n] = sum over positions of x - shift, norms[g, c, n] = |x| /
// sqrt(P).
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    sums_rows_kernel(const scalar_t* __restrict__ x, MapLayout layout, const double* __restrict__ shift,
                     double* __restrict__ sums, double* __restrict__ norms) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarpSize;
  if (row >= layout.maps * layout.samples * layout.channels) return;
  const int64_t sample = row / layout.channels, channel = row % layout.channels;
  const scalar_t* map = x + sample * layout.sample_stride + channel * layout.channel_stride;
  const double offset = shift[sample / layout.samples * layout.channels + channel];
  double sum = 0, squares = 0;
  for (int64_t p = threadIdx.x % kWarpSize; p < layout.positions; p += kWarpSize) {
    const double value = static_cast<double>(map[p * layout.position_stride]);
    sum += value - offset;
    squares = fma(value, value, squares);
  }
  sum = warp_sum(sum);
  squares = warp_sum(squares);
  if (threadIdx.x % kWarpSize != 0) return;
  const int64_t place = place_of_sum(sample, channel, layout);
  sums[place] = sum;
  norms[place] = sqrt(squares / static_cast<double>(layout.positions));
}

// The same in channels_last: block (channels, sample), blockDim.x = kWarpSize channels wide and blockDim.y positions
// high, kThreads in all.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    sums_columns_kernel(const scalar_t* __restrict__ x, MapLayout layout, const double* __restrict__ shift,
                        double* __restrict__ sums, double* __restrict__ norms) {
  constexpr int kHigh = kThreads / kWarpSize;
  __shared__ double partial_sums[kHigh][kWarpSize];
  __shared__ double partial_squares[kHigh][kWarpSize];
  const int64_t groups = (layout.channels + kWarpSize - 1) / kWarpSize;
  const int64_t sample = blockIdx.x / groups;
  const int64_t channel = blockIdx.x % groups * kWarpSize + threadIdx.x;
  const bool inside = channel < layout.channels;
  double sum = 0, squares = 0;
  if (inside) {
    const scalar_t* map = x + sample * layout.sample_stride + channel * layout.channel_stride;
    const double offset = shift[sample / layout.samples * layout.channels + channel];
    for (int64_t p = threadIdx.y; p < layout.positions; p += kHigh) {
      const double value = static_cast<double>(map[p * layout.position_stride]);
      sum += value - offset;
      squares = fma(value, value, squares);
    }
  }
  partial_sums[threadIdx.y][threadIdx.x] = sum;
  partial_squares[threadIdx.y][threadIdx.x] = squares;
  __syncthreads();
  if (threadIdx.y != 0 || !inside) return;
  for (int row = 1; row < kHigh; ++row) {
    sum += partial_sums[row][threadIdx.x];
    squares += partial_squares[row][threadIdx.x];
  }
  const int64_t place = place_of_sum(sample, channel, layout);
  sums[place] = sum;
  norms[place] = sqrt(squares / static_cast<double>(layout.positions));
}

// `channels` counts those of all maps: sum[c] += sum over samples of sums[c, n], and the same for the norms; one warp
// per channel.
__global__ void __launch_bounds__(kThreads)
    merge_sums_kernel(const double* __restrict__ sums, const double* __restrict__ norms, double* __restrict__ sum,
                      double* __restrict__ norm_sum, int64_t samples, int64_t channels) {
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarpSize;
  if (channel >= channels) return;
  double sum_total = 0, norm_total = 0;
  for (int64_t n = threadIdx.x % kWarpSize; n < samples; n += kWarpSize) {
    sum_total += sums[channel * samples + n];
    norm_total += norms[channel * samples + n];
  }
  sum_total = warp_sum(sum_total);
  norm_total = warp_sum(norm_total);
  if (threadIdx.x % kWarpSize != 0) return;
  sum[channel] += sum_total;
  norm_sum[channel] += norm_total;
}

MapLayout layout_of(const Stack& stack) {
  const int64_t c = stack.map.channels, p = stack.map.positions;
  if (stack.map.channels_fastest || p == 1) return {stack.size, stack.samples(), c, p, c * p, 1, c};
  return {stack.size, stack.samples(), c, p, c * p, p, 1};
}

// The kernel for maps of scalar_t; 3xTF32 would lose the precision of float64 maps.
template <typename scalar_t>
auto cross_kernel_for(bool channels_last, bool tensor_cores) {
  constexpr bool kTensor = !std::is_same_v<scalar_t, double>;
  if (kTensor && tensor_cores) {
    return channels_last ? cross_kernel<scalar_t, true, kTensor> : cross_kernel<scalar_t, false, kTensor>;
  }
  return channels_last ? cross_kernel<scalar_t, true, false> : cross_kernel<scalar_t, false, false>;
}

void add_cross(Tensor& cross, const Stack& stack, const Tensor& shift, bool tensor_cores) {
  const MapLayout layout = layout_of(stack);
  const int64_t side = ceil_div(layout.channels, kTile), tiles = side * (side + 1) / 2;
  const int64_t total = layout.samples * layout.positions;
  // Splits are whole runs, so that only the last run of the last split is short, and belong to one map, so that a stack
  // gives the bits of its maps.
  const int64_t wanted = std::clamp<int64_t>(kBlocksWanted / tiles, 1, ceil_div(total, kShortestSplit));
  const int64_t per_split = ceil_div(ceil_div(total, wanted), kRun) * kRun;
  const int64_t splits = ceil_div(total, per_split);
  const cudaStream_t stream = current_stream(cross);
  const Tensor partial = empty_on_device(splits * layout.maps * tiles * kTileEntries, ScalarType::Double, cross);
  dispatch_floating(stack.map.tensor.scalar_type(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    launch(cross_kernel_for<scalar_t>(layout.channel_stride == 1, tensor_cores), dim3(layout.maps * tiles, splits),
           dim3(kThreads), stream, stack.map.tensor.data_ptr(), layout, shift.data_ptr(), partial.data_ptr(), per_split,
           tiles);
  });
  launch(merge_cross_kernel, dim3(layout.maps * tiles), dim3(kThreads), stream, partial.data_ptr(), cross.data_ptr(),
         layout.channels, splits, tiles);
}

void add_sums(Tensor& sum, Tensor& norm_sum, const Stack& stack, const Tensor& shift) {
  const MapLayout layout = layout_of(stack);
  const int64_t samples = layout.maps * layout.samples, rows = samples * layout.channels;
  const cudaStream_t stream = current_stream(sum);
  const Tensor sums = empty_on_device(rows, ScalarType::Double, sum);
  const Tensor norms = empty_on_device(rows, ScalarType::Double, sum);
  const void* data = stack.map.tensor.data_ptr();
  dispatch_floating(stack.map.tensor.scalar_type(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    if (layout.channel_stride == 1) {
      launch(sums_columns_kernel<scalar_t>, dim3(samples * ceil_div(layout.channels, kWarpSize)),
             dim3(kWarpSize, kThreads / kWarpSize), stream, data, layout, shift.data_ptr(), sums.data_ptr(),
             norms.data_ptr());
    } else {
      launch(sums_rows_kernel<scalar_t>, dim3(ceil_div(rows, kThreads / kWarpSize)), dim3(kThreads), stream, data,
             layout, shift.data_ptr(), sums.data_ptr(), norms.data_ptr());
    }
  });
  const int64_t channels = layout.maps * layout.channels;
  launch(merge_sums_kernel, dim3(ceil_div(channels, kThreads / kWarpSize)), dim3(kThreads), stream, sums.data_ptr(),
         norms.data_ptr(), sum.data_ptr(), norm_sum.data_ptr(), layout.samples, channels);
}

// `shape` is the shape for one map.
void check_moment(const Tensor& moment, const Tensor& x, bool stacked, std::vector<int64_t> shape, const char* name) {
  check_same_device(moment, x, name);
  BDP_CHECK(moment.scalar_type() == ScalarType::Double && moment.is_contiguous(), name,
            " must be a contiguous float64 tensor");
  const int64_t channels = shape[0];
  if (stacked) shape.insert(shape.begin(), x.size(0));
  BDP_CHECK(moment.sizes().vec() == shape, name, " must have the channels of x, ", channels, ", along each axis");
}

void channel_moments_update_(Tensor cross, Tensor sum, Tensor norm_sum, const Tensor& x, const Tensor& shift,
                             bool tensor_cores) {
  const bool stacked = cross.dim() == 3;
  BDP_CHECK(x.dim() >= (stacked ? 3 : 2), "x must be [N, C, *], or [G, N, C, *] for a stack, got ", x.dim(),
            " dimensions");
  const int64_t channels = x.size(stacked ? 2 : 1);
  check_moment(cross, x, stacked, {channels, channels}, "cross");
  check_moment(sum, x, stacked, {channels}, "sum");
  check_moment(norm_sum, x, stacked, {channels}, "norm_sum");
  check_moment(shift, x, stacked, {channels}, "shift");
  if (x.numel() == 0) return;
  const DeviceGuard guard(x.get_device_index());
  const Stack stack = as_stack(x, stacked);
  add_cross(cross, stack, shift, tensor_cores);
  add_sums(sum, norm_sum, stack, shift);
}

}  // namespace
}  // namespace bdprune::cuda

STABLE_TORCH_LIBRARY_IMPL(bdprune, CUDA, m)
{
  m.impl("channel_moments_update_", TORCH_BOX(&bdprune::cuda::channel_moments_update_));
}
