// filter_spectral_norms on CUDA: all filters of all weights in at most one launch per dtype and size class.
//
// A filter is a matrix of a short and a long side. Its Gram matrix on the short side (n x n) is accumulated in float64,
// and the root of its largest eigenvalue is the norm. A launch covers every filter of its class through a table of
// weights, so a fleet of models costs as few launches as one layer does.
//   n = 1        one warp per filter: the 2-norm (1x1 and linear weights, depthwise filters)
//   2 <= n <= 9  one warp per filter: 45 accumulators per lane, lanes along the long side (3x3, or up to 9 channels)
//   n <= 49      one block per filter, Gram matrix in shared memory (5x5, 7x7)
//   larger       the same block code with the Gram matrix in a device workspace; correct, not tuned
// Nothing is summed by atomics: results repeat to the bit. A filter that is not finite gives NaN, and only itself.
#include <algorithm>
#include <array>
#include <utility>

#include "../core/jacobi.h"
#include "utils.cuh"

namespace bdprune::cuda {
namespace {

constexpr int kWarpSide = 9;  // largest n of the warp kernel
constexpr int kGramEntries = kWarpSide * (kWarpSide + 1) / 2;
constexpr int kEvenSide = kWarpSide + 1;  // Jacobi runs on an even size; the added row is zero
constexpr int kWarpsPerBlock = 4;
constexpr int kBlockThreads = 256;
constexpr int kBlockSide = core::kJacobiMax + core::kJacobiMax % 2;  // largest even n in shared memory
constexpr int64_t kWorkspaceBlocks = 256;                // most blocks of the launch that works in device memory,
constexpr int64_t kWorkspaceDoubles = int64_t{1} << 25;  // and most memory it takes (256 MiB)

// One weight tensor [filters, short, long] or [stacks, filters, short, long], as the kernels read it.
struct WeightTable {
  const void* data;
  const void* scale;  // null: 1
  int64_t begin;      // number of its first filter within the launch
  int64_t output;     // place of its first filter in the result
  int64_t filters;    // filters per stack entry
  int64_t stack_stride, filter_stride, short_stride, long_stride;
  int64_t scale_stack_stride, scale_stride;
  int64_t long_size;
  int32_t short_size;
  int32_t scale_dtype;
};

// One filter of it.
template <typename scalar_t>
struct Filter {
  const scalar_t* data;
  int64_t short_stride, long_stride, long_size;
  int short_size;
  double scale;
  int64_t output;

  __device__ __forceinline__ scalar_t at(int s, int64_t l) const { return data[s * short_stride + l * long_stride]; }
};

__device__ inline double load_scale(const void* data, int32_t dtype, int64_t index) {
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Float:
      return static_cast<const float*>(data)[index];
    case ScalarType::Double:
      return static_cast<const double*>(data)[index];
    case ScalarType::Half:
      return static_cast<float>(static_cast<const torch::headeronly::Half*>(data)[index]);
    default:
      return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data)[index]);
  }
}

// Finds the weight that holds the given filter of the launch: the last one that begins at or before it.
template <typename scalar_t>
__device__ Filter<scalar_t> find_filter(const WeightTable* __restrict__ table, int num_weights, int64_t filter) {
  int low = 0, high = num_weights - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table[middle].begin <= filter) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const WeightTable& weight = table[low];
  const int64_t local = filter - weight.begin;
  const int64_t stack = local / weight.filters, own = local % weight.filters;
  const int64_t scale_at = stack * weight.scale_stack_stride + own * weight.scale_stride;
  return {static_cast<const scalar_t*>(weight.data) + stack * weight.stack_stride + own * weight.filter_stride,
          weight.short_stride,
          weight.long_stride,
          weight.long_size,
          weight.short_size,
          weight.scale ? fabs(load_scale(weight.scale, weight.scale_dtype, scale_at)) : 1.0,
          weight.output + local};
}

// The threads that share one filter: a warp or a whole block.
struct WarpGroup {
  __device__ int rank() const { return threadIdx.x % kWarpSize; }
  __device__ int size() const { return kWarpSize; }
  __device__ void sync() const { __syncwarp(); }
};
struct BlockGroup {
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return kBlockThreads; }
  __device__ void sync() const { __syncthreads(); }
};

// Power of two that brings the largest entry of a float64 filter near 1, so that its squares neither overflow nor
// vanish; narrower dtypes need none, their squares lie well inside float64. Called by a full warp.
template <typename scalar_t>
__device__ double range_factor(const Filter<scalar_t>& filter) {
  if constexpr (!std::is_same_v<scalar_t, double>) {
    return 1.0;
  } else {
    double largest = 0;
    const int64_t size = filter.short_size * filter.long_size;
    for (int64_t i = threadIdx.x % kWarpSize; i < size; i += kWarpSize) {
      largest = fmax(largest, fabs(filter.at(static_cast<int>(i / filter.long_size), i % filter.long_size)));
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, offset));
    }
    // The clamp keeps the factor itself, and its inverse, normal numbers.
    return largest > 0 && isfinite(largest) ? ldexp(1.0, -min(max(ilogb(largest), -1000), 1000)) : 1.0;
  }
}

// Diagonalises the symmetric n x n matrix a (n even, row-major, both triangles) by round-robin Jacobi. The rotations of
// one step touch disjoint pairs of rows and columns, so the matrix falls into 2x2 blocks that change independently:
// block (i, j) becomes R_i^T B R_j.
template <typename Group>
__device__ void diagonalise(Group group, double* a, core::Rotation<double>* rotations, int n, int sweeps) {
  const int pairs = core::jacobi_pairs(n), steps = core::jacobi_steps(n);
  for (int turn = 0; turn < sweeps * steps; ++turn) {
    const int step = turn % steps;
    for (int i = group.rank(); i < pairs; i += group.size()) {
      const core::Pair pair = core::jacobi_pair(n, step, i);
      rotations[i] = core::jacobi_rotation(a[pair.p * n + pair.p], a[pair.q * n + pair.q], a[pair.p * n + pair.q]);
    }
    group.sync();
    for (int block = group.rank(); block < pairs * pairs; block += group.size()) {
      const int i = block / pairs, j = block % pairs;
      const core::Pair row = core::jacobi_pair(n, step, i), column = core::jacobi_pair(n, step, j);
      const core::Rotation<double> left = rotations[i], right = rotations[j];
      double* pp = a + row.p * n + column.p;
      double* pq = a + row.p * n + column.q;
      double* qp = a + row.q * n + column.p;
      double* qq = a + row.q * n + column.q;
      const double u = left.c * *pp - left.s * *qp, v = left.c * *pq - left.s * *qq;
      const double w = left.s * *pp + left.c * *qp, x = left.s * *pq + left.c * *qq;
      *pp = right.c * u - right.s * v;
      *pq = right.s * u + right.c * v;
      *qp = right.c * w - right.s * x;
      *qq = right.s * w + right.c * x;
    }
    group.sync();
  }
}

// Root of the largest eigenvalue of the Gram matrix a (n x n, n even, overwritten). NaN if its trace is not finite.
template <typename Group>
__device__ double largest_root(Group group, double* a, core::Rotation<double>* rotations, int n, int sweeps) {
  double trace = 0;
  for (int i = 0; i < n; ++i) trace += a[i * n + i];
  if (trace == 0) return 0;
  if (!isfinite(trace)) return NAN;
  group.sync();
  for (int i = group.rank(); i < n * n; i += group.size()) a[i] /= trace;
  group.sync();
  diagonalise(group, a, rotations, n, sweeps);
  double largest = a[0];
  for (int i = 1; i < n; ++i) largest = fmax(largest, a[i * n + i]);
  return sqrt(largest) * sqrt(trace);
}

// Writes norm * |scale| / factor, in float32 or float64.
template <typename scalar_t>
__device__ void store_norm(void* output, bool wide, const Filter<scalar_t>& filter, double norm, double factor) {
  const double result = norm / factor * filter.scale;
  if (wide) {
    static_cast<double*>(output)[filter.output] = result;
  } else {
    static_cast<float*>(output)[filter.output] = static_cast<float>(result);
  }
}

// n = 1: the 2-norm of the long side, one warp per filter.
template <typename scalar_t>
__global__ void __launch_bounds__(kWarpSize* kWarpsPerBlock, 3)
    vector_norms_kernel(const WeightTable* __restrict__ table, int num_weights, int64_t num_filters, void* output,
                        bool wide) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (index >= num_filters) return;
  const Filter<scalar_t> filter = find_filter<scalar_t>(table, num_weights, index);
  const double factor = range_factor(filter);
  double sum = 0;
  for (int64_t l = threadIdx.x % kWarpSize; l < filter.long_size; l += kWarpSize) {
    const double value = static_cast<double>(filter.at(0, l)) * factor;
    sum = fma(value, value, sum);
  }
  sum = warp_sum(sum);
  const double norm = isfinite(sum) ? sqrt(sum) : static_cast<double>(NAN);
  if (threadIdx.x % kWarpSize == 0) store_norm(output, wide, filter, norm, factor);
}

// Adds the accumulators of all lanes. Every exchange halves what a lane holds, so the 45 sums cost 46 exchanges instead
// of 225; at the end each sum is complete on one lane, which puts it into both triangles of the matrix.
template <int kCount>
__device__ __forceinline__ void fold(double (&values)[kGramEntries + 1], int offset, bool upper) {
  constexpr int kHalf = (kCount + 1) / 2;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const double high = i + kHalf < kCount ? values[i + kHalf] : 0.0;
    const double received = __shfl_xor_sync(kFullWarp, upper ? values[i] : high, offset);
    values[i] = (upper ? high : values[i]) + received;
  }
}

// n <= 9: lanes along the long side, 32 entries of it per turn through shared memory, so that global reads coalesce
// whichever side is contiguous.
template <typename scalar_t>
__global__ void __launch_bounds__(kWarpSize* kWarpsPerBlock, 3)
    warp_norms_kernel(const WeightTable* __restrict__ table, int num_weights, int64_t num_filters, void* output,
                      bool wide) {
  __shared__ compute_t<scalar_t> stages[kWarpsPerBlock][kWarpSize * kWarpSide];
  __shared__ double grams[kWarpsPerBlock][kEvenSide * kEvenSide];
  __shared__ core::Rotation<double> rotations[kWarpsPerBlock][kEvenSide / 2];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
  if (index >= num_filters) return;  // the whole warp leaves; only warps are synchronised below
  const Filter<scalar_t> filter = find_filter<scalar_t>(table, num_weights, index);
  const double factor = range_factor(filter);
  compute_t<scalar_t>* stage = stages[warp];

  double sums[kGramEntries + 1] = {};
  const bool long_first = filter.long_stride < filter.short_stride;
  for (int64_t base = 0; base < filter.long_size; base += kWarpSize) {
#pragma unroll
    for (int i = 0; i < kWarpSide; ++i) {
      const int entry = i * kWarpSize + lane;
      const int s = long_first ? i : entry % kWarpSide;
      const int l = long_first ? lane : entry / kWarpSide;
      const bool inside = s < filter.short_size && base + l < filter.long_size;
      stage[l * kWarpSide + s] = inside ? static_cast<compute_t<scalar_t>>(filter.at(s, base + l)) : 0;
    }
    __syncwarp();
    double values[kWarpSide];
#pragma unroll
    for (int i = 0; i < kWarpSide; ++i) values[i] = static_cast<double>(stage[lane * kWarpSide + i]) * factor;
    __syncwarp();
#pragma unroll
    for (int i = 0, entry = 0; i < kWarpSide; ++i) {
#pragma unroll
      for (int j = i; j < kWarpSide; ++j, ++entry) sums[entry] = fma(values[i], values[j], sums[entry]);
    }
  }

  // 45 -> 23 -> 12 -> 6 -> 3 -> 2 sums per lane. The upper lane of a pair may hold one entry that is only padding.
  fold<45>(sums, 16, lane & 16);
  fold<23>(sums, 8, lane & 8);
  fold<12>(sums, 4, lane & 4);
  fold<6>(sums, 2, lane & 2);
  fold<3>(sums, 1, lane & 1);

  double* gram = grams[warp];
  const int side = filter.short_size + filter.short_size % 2;
  for (int i = lane; i < side * side; i += kWarpSize) gram[i] = 0;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int in3 = (lane & 1 ? 2 : 0) + i;
    const int in23 = (lane & 8 ? 12 : 0) + (lane & 4 ? 6 : 0) + (lane & 2 ? 3 : 0) + in3;
    const int entry = (lane & 16 ? 23 : 0) + in23;
    if (in3 >= 3 || in23 >= 23 || entry >= kGramEntries) continue;
    int row = 0, rest = entry;
    while (rest >= kWarpSide - row) rest -= kWarpSide - row++;
    const int column = row + rest;
    if (column < side) gram[row * side + column] = gram[column * side + row] = sums[i];
  }
  __syncwarp();
  const double norm = largest_root(WarpGroup(), gram, rotations[warp], side, core::jacobi_sweeps(filter.short_size));
  if (lane == 0) store_norm(output, wide, filter, norm, factor);
}

// n > 9: one block per filter and turn, one warp per entry of the Gram matrix, which lies in shared memory or, without
// a limit on n, in `workspace`: per block `stride` doubles, the matrix first and the rotations behind it.
template <typename scalar_t, bool kShared>
__global__ void __launch_bounds__(kBlockThreads, 2)
    block_norms_kernel(const WeightTable* __restrict__ table, int num_weights, int64_t num_filters, void* output,
                       bool wide, double* workspace, int64_t stride) {
  __shared__ double shared_gram[kShared ? kBlockSide * kBlockSide : 1];
  __shared__ core::Rotation<double> shared_rotations[kShared ? kBlockSide / 2 : 1];
  constexpr int kWarps = kBlockThreads / kWarpSize;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int64_t index = blockIdx.x; index < num_filters; index += gridDim.x) {
    const Filter<scalar_t> filter = find_filter<scalar_t>(table, num_weights, index);
    const int side = filter.short_size + filter.short_size % 2;
    double* gram = kShared ? shared_gram : workspace + blockIdx.x * stride;
    auto* rotations = kShared ? shared_rotations
                              : reinterpret_cast<core::Rotation<double>*>(gram + static_cast<int64_t>(side) * side);
    const double factor = range_factor(filter);
    for (int entry = warp; entry < side * side; entry += kWarps) {
      const int row = entry / side, column = entry % side;
      if (column < row) continue;
      double sum = 0;
      for (int64_t l = lane; column < filter.short_size && l < filter.long_size; l += kWarpSize) {
        sum = fma(static_cast<double>(filter.at(row, l)) * factor, static_cast<double>(filter.at(column, l)) * factor,
                  sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) gram[row * side + column] = gram[column * side + row] = sum;
    }
    __syncthreads();
    // Jacobi converges quadratically: the sweeps that serve n = 49 need few more for any n that a kernel window has.
    const int sweeps = core::jacobi_sweeps(filter.short_size) + (kShared ? 0 : 3);
    const double norm = largest_root(BlockGroup(), gram, rotations, side, sweeps);
    if (threadIdx.x == 0) store_norm(output, wide, filter, norm, factor);
    __syncthreads();  // the next turn overwrites the matrix that other threads may still read
  }
}

enum SizeClass { kVector, kWarp, kBlock, kWorkspace, kNumClasses };

constexpr std::array kDtypes = {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float, ScalarType::Double};

SizeClass size_class(int64_t side) {
  return side <= 1 ? kVector : side <= kWarpSide ? kWarp : side <= core::kJacobiMax ? kBlock : kWorkspace;
}

// The weights of one launch.
struct Launch {
  std::vector<WeightTable> table;
  int64_t filters = 0;
  int64_t largest_side = 0;
};

// Weight with its window axes (the last two) collapsible into one, as they are in every dense layout.
Tensor with_flat_window(const Tensor& weight) {
  const int64_t d = weight.dim();
  const bool flat = d == 2 || weight.size(d - 2) <= 1 || weight.size(d - 1) <= 1 ||
                    weight.stride(d - 2) == weight.size(d - 1) * weight.stride(d - 1);
  return flat ? weight : torch::stable::contiguous(weight);
}

// Table entry of a weight [O, I], [O, I, kh, kw] or [G, O, I, kh, kw] with a flat window; begin and output are not set.
WeightTable describe(const Tensor& weight, const OptionalTensor& scale) {
  const int64_t d = weight.dim();
  const bool stacked = d == 5;
  WeightTable entry{};
  entry.data = weight.data_ptr();
  entry.filters = weight.size(stacked);
  entry.stack_stride = stacked ? weight.stride(0) : 0;
  entry.filter_stride = weight.stride(stacked);
  int64_t rows = weight.size(stacked + 1), row_stride = weight.stride(stacked + 1);
  int64_t columns = 1, column_stride = 1;
  if (d > 2) {
    columns = weight.size(d - 2) * weight.size(d - 1);
    column_stride = weight.size(d - 1) > 1 ? weight.stride(d - 1) : weight.stride(d - 2);
  }
  if (rows > columns) {
    std::swap(rows, columns);
    std::swap(row_stride, column_stride);
  }
  BDP_CHECK(rows < 32768, "the smaller side of a filter must be below 32768, got ", rows);
  entry.short_size = static_cast<int32_t>(rows);
  entry.short_stride = row_stride;
  entry.long_size = rows > 0 ? columns : 0;
  entry.long_stride = column_stride;
  if (scale) {
    const int64_t last = scale->dim() - 1;
    entry.scale = scale->data_ptr();
    entry.scale_dtype = static_cast<int32_t>(scale->scalar_type());
    entry.scale_stride = scale->stride(last);
    entry.scale_stack_stride = stacked ? scale->stride(0) : 0;
  }
  return entry;
}

void check_weight(const Tensor& weight, const OptionalTensor& scale, const Tensor& first) {
  const int64_t d = weight.dim();
  BDP_CHECK(d == 2 || d == 4 || d == 5, "a weight must be [O, I], [O, I, kh, kw] or [G, O, I, kh, kw], got ", d,
            " dimensions");
  check_same_device(weight, first, "every weight");
  if (!scale) return;
  check_same_device(*scale, first, "every scale");
  BDP_CHECK(is_floating(scale->scalar_type()), "a scale must have a floating dtype");
  const bool stacked = d == 5;
  const bool fits = scale->dim() == 1 + stacked && scale->size(stacked) == weight.size(stacked) &&
                    (!stacked || scale->size(0) == weight.size(0));
  BDP_CHECK(fits, "a scale must be [O] or [G, O] like the filters of its weight");
}

template <typename scalar_t>
void launch_class(SizeClass size, const Launch& work, const WeightTable* table, Tensor& output, cudaStream_t stream) {
  const bool wide = output.scalar_type() == ScalarType::Double;
  const int count = static_cast<int>(work.table.size());
  if (size == kVector || size == kWarp) {
    auto kernel = size == kVector ? vector_norms_kernel<scalar_t> : warp_norms_kernel<scalar_t>;
    launch(kernel, dim3(ceil_div(work.filters, kWarpsPerBlock)), dim3(kWarpSize * kWarpsPerBlock), stream, table, count,
           work.filters, output.data_ptr(), wide);
    return;
  }
  if (size == kBlock) {
    launch(block_norms_kernel<scalar_t, true>, dim3(std::min<int64_t>(work.filters, 1 << 20)), dim3(kBlockThreads),
           stream, table, count, work.filters, output.data_ptr(), wide, nullptr, 0);
    return;
  }
  const int64_t side = work.largest_side + work.largest_side % 2;
  const int64_t stride = side * side + 3 * (side / 2);
  const int64_t fitting = std::max<int64_t>(kWorkspaceDoubles / stride, 1);
  const int64_t blocks = std::min({work.filters, kWorkspaceBlocks, fitting});
  const Tensor workspace = empty_on_device(blocks * stride, ScalarType::Double, output);
  launch(block_norms_kernel<scalar_t, false>, dim3(blocks), dim3(kBlockThreads), stream, table, count, work.filters,
         output.data_ptr(), wide, workspace.data_ptr(), stride);
}

Tensor filter_spectral_norms(const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& scales) {
  BDP_CHECK(!weights.empty() && weights.size() == scales.size(), "expected one scale (or None) per weight, got ",
            weights.size(), " weights and ", scales.size(), " scales");
  const DeviceGuard guard(weights[0].get_device_index());
  std::array<std::array<Launch, kDtypes.size()>, kNumClasses> launches;
  std::vector<Tensor> alive;  // copies that the kernels read
  int64_t num_filters = 0;
  bool wide = false;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_weight(weights[i], scales[i], weights[0]);
    alive.push_back(with_flat_window(weights[i]));
    const Tensor& weight = alive.back();
    const auto dtype = std::find(kDtypes.begin(), kDtypes.end(), weight.scalar_type());
    BDP_CHECK(dtype != kDtypes.end(), "a weight must be float16, bfloat16, float32 or float64");
    wide = wide || *dtype == ScalarType::Double;
    WeightTable entry = describe(weight, scales[i]);
    const int64_t filters = (weight.dim() == 5 ? weight.size(0) : 1) * entry.filters;
    if (filters == 0) continue;
    Launch& work = launches[size_class(entry.short_size)][dtype - kDtypes.begin()];
    entry.begin = work.filters;
    entry.output = num_filters;
    work.table.push_back(entry);
    work.filters += filters;
    work.largest_side = std::max<int64_t>(work.largest_side, entry.short_size);
    num_filters += filters;
  }
  Tensor output = empty_on_device(num_filters, wide ? ScalarType::Double : ScalarType::Float, weights[0]);
  if (num_filters == 0) return output;

  std::vector<WeightTable> host;
  for (const auto& by_dtype : launches) {
    for (const Launch& work : by_dtype) host.insert(host.end(), work.table.begin(), work.table.end());
  }
  const size_t bytes = host.size() * sizeof(WeightTable);
  const Tensor device = empty_on_device(static_cast<int64_t>(bytes), ScalarType::Byte, weights[0]);
  const cudaStream_t stream = current_stream(weights[0]);
  // From pageable memory the copy is staged before the call returns, so `host` may go out of scope. A graph would read
  // it again at every replay.
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  BDP_CHECK(capture == cudaStreamCaptureStatusNone, "filter_spectral_norms cannot be captured in a CUDA graph");
  STD_CUDA_CHECK(cudaMemcpyAsync(device.data_ptr(), host.data(), bytes, cudaMemcpyHostToDevice, stream));

  const auto* table = static_cast<const WeightTable*>(device.data_ptr());
  for (int size = 0; size < kNumClasses; ++size) {
    for (size_t d = 0; d < kDtypes.size(); ++d) {
      const Launch& work = launches[size][d];
      if (work.filters == 0) continue;
      dispatch_floating(kDtypes[d], [&](auto type) {
        launch_class<typename decltype(type)::type>(static_cast<SizeClass>(size), work, table, output, stream);
      });
      table += work.table.size();
    }
  }
  return output;
}

}  // namespace
}  // namespace bdprune::cuda

STABLE_TORCH_LIBRARY_IMPL(bdprune, CUDA, m)
{
  m.impl("filter_spectral_norms", TORCH_BOX(&bdprune::cuda::filter_spectral_norms));
}
