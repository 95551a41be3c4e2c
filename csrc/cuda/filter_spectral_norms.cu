// filter_spectral_norms on CUDA: all filters of all weights in one launch.
//
// A filter is a matrix with a short and a long side. Its Gram matrix on the short side (n x n) is summed in float64,
// and the root of its largest eigenvalue is the norm. The launch takes a table of weights, so any number of models
// needs only one small copy and one launch, like a single layer. Each filter belongs to one of four classes, by n:
//   n = 1        one warp per filter: the 2-norm (1x1 and linear weights, depthwise filters)
//   2 <= n <= 9  one warp per filter: 45 accumulators per lane, lanes along the long side (3x3, or up to 9 channels)
//   n <= 49      one block per filter, Gram matrix in shared memory (5x5, 7x7)
//   larger       the same block code with the Gram matrix in a device workspace; correct, but not tuned
// Each class has its own run of blocks, the most expensive first. The kernel's registers are those of the second class,
// whose 45 float64 sums need them; the first class offsets its fewer warps by more loads in flight. No sum uses
// atomics: results are reproducible bit for bit. A filter that is not finite gives NaN without affecting others.
#include <algorithm>
#include <limits>
#include <utility>

#include "../core/jacobi.h"
#include "utils.cuh"

namespace bdprune::cuda {
namespace {

constexpr int kWarpSide = 9;  // largest n of the warp kernel
constexpr int kGramEntries = kWarpSide * (kWarpSide + 1) / 2;
constexpr int kEvenSide = kWarpSide + 1;  // Jacobi runs on an even size; the added row is zero
constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = kWarpSize * kWarpsPerBlock;
constexpr int kVectorLoads = 8;  // in flight per lane, n = 1

constexpr int kBlockSide = core::kJacobiMax + core::kJacobiMax % 2;  // largest even n in shared memory
constexpr int64_t kMostBlocks = 1 << 20;                             // of a class whose blocks loop over filters
constexpr int64_t kWorkspaceBlocks = 256;                // maximum blocks of the class that uses device memory,
constexpr int64_t kWorkspaceDoubles = int64_t{1} << 25;  // and the maximum memory it uses (256 MiB)

// One weight tensor [filters, short, long] or [stacks, filters, short, long], for the kernels.
struct WeightTable {
  const void* data;
  const void* scale;        // null: 1
  int64_t begin;            // number of its first filter within its class
  int64_t output;           // index of its first filter in the result
  int64_t stacks, filters;  // filters per stack entry
  int64_t stack_stride, filter_stride, short_stride, long_stride;
  int64_t scale_stack_stride, scale_stride;
  int64_t long_size;
  int32_t short_size;
  ScalarType dtype, scale_dtype;
};

// The classes in the order of their blocks.
enum SizeClass { kWorkspace, kBlock, kWarp, kVector, kNumClasses };

// The work of the blocks of one class.
struct ClassWork {
  int first_weight, weights;  // of the table
  int blocks;
  int64_t filters;
};

struct Work {
  ClassWork classes[kNumClasses];
  int64_t workspace_stride;  // doubles for each block of kWorkspace
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

// Finds the weight that holds the given filter of the class: the last one that starts at or before it.
__device__ inline const WeightTable& find_weight(const WeightTable* __restrict__ table, int num_weights,
                                                 int64_t filter) {
  int low = 0, high = num_weights - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table[middle].begin <= filter) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return table[low];
}

template <typename scalar_t>
__device__ Filter<scalar_t> filter_of(const WeightTable& weight, int64_t filter) {
  const int64_t local = filter - weight.begin;
  const int64_t stack = local / weight.filters, own = local % weight.filters;
  const int64_t scale_at = stack * weight.scale_stack_stride + own * weight.scale_stride;
  return {static_cast<const scalar_t*>(weight.data) + stack * weight.stack_stride + own * weight.filter_stride,
          weight.short_stride,
          weight.long_stride,
          weight.long_size,
          weight.short_size,
          weight.scale ? fabs(read_scalar(weight.scale, weight.scale_dtype, scale_at)) : 1.0,
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
  __device__ int size() const { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
};

// Power of two that scales the largest entry of a float64 filter to about 1, so that its squares neither overflow nor
// underflow. Narrower dtypes do not need it: their squares fit float64. Called by a full warp.
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
    // The clamp keeps the factor and its inverse normal numbers.
    return largest > 0 && isfinite(largest) ? ldexp(1.0, -min(max(ilogb(largest), -1000), 1000)) : 1.0;
  }
}

// Diagonalises the symmetric n x n matrix a (n even, row-major, both triangles) by round-robin Jacobi. The rotations of
// one step use disjoint pairs of rows and columns, so the matrix consists of 2x2 blocks that change independently:
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

// Sweeps for a filter; with one more, eigenvalues within 1e-8 of each other are also accurate to float64.
template <typename scalar_t>
__device__ __forceinline__ int sweeps_for(const Filter<scalar_t>& filter) {
  return core::jacobi_sweeps(filter.short_size) + (std::is_same_v<scalar_t, double> ? 1 : 0);
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

// n = 1: the 2-norm of the long side, by one warp.
template <typename scalar_t>
__device__ __forceinline__ void vector_norm(const Filter<scalar_t>& filter, void* output, bool wide) {
  constexpr int64_t kTurn = kWarpSize * kVectorLoads;
  const int lane = threadIdx.x % kWarpSize;
  const double factor = range_factor(filter);
  double sum = 0;
  for (int64_t base = lane; base < filter.long_size; base += kTurn) {
    scalar_t values[kVectorLoads];
#pragma unroll
    for (int i = 0; i < kVectorLoads; ++i) {
      const int64_t l = base + i * kWarpSize;
      values[i] = l < filter.long_size ? filter.at(0, l) : static_cast<scalar_t>(0);
    }
#pragma unroll
    for (int i = 0; i < kVectorLoads; ++i) {
      const double value = static_cast<double>(values[i]) * factor;
      sum = fma(value, value, sum);
    }
  }
  sum = warp_sum(sum);
  const double norm = isfinite(sum) ? sqrt(sum) : static_cast<double>(NAN);
  if (lane == 0) store_norm(output, wide, filter, norm, factor);
}

// Sums the accumulators over all lanes. Every exchange halves the number of sums in a lane, so the 45 sums take 46
// exchanges instead of 225; at the end each sum is complete on one lane, which writes it to both triangles of the
// matrix.
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

// Shared memory of a block of each class.
struct WarpShared {
  double grams[kWarpsPerBlock][kEvenSide * kEvenSide];
  core::Rotation<double> rotations[kWarpsPerBlock][kEvenSide / 2];
  double stages[kWarpsPerBlock][kWarpSize * kWarpSide];  // float for all dtypes except float64
};
struct BlockShared {
  double gram[kBlockSide * kBlockSide];
  core::Rotation<double> rotations[kBlockSide / 2];
};
union Shared {
  WarpShared warp;
  BlockShared block;
};

// n <= 9, by one warp: lanes along the long side, which is staged in shared memory in steps of 32 entries, so that
// global reads coalesce whichever side is contiguous.
template <typename scalar_t>
__device__ __forceinline__ void warp_norm(const Filter<scalar_t>& filter, WarpShared& shared, void* output, bool wide) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const double factor = range_factor(filter);
  auto* stage = reinterpret_cast<compute_t<scalar_t>*>(shared.stages[warp]);

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

  // 45 -> 23 -> 12 -> 6 -> 3 -> 2 sums per lane. The upper lane of a pair may hold one padding entry.
  fold<45>(sums, 16, lane & 16);
  fold<23>(sums, 8, lane & 8);
  fold<12>(sums, 4, lane & 4);
  fold<6>(sums, 2, lane & 2);
  fold<3>(sums, 1, lane & 1);

  double* gram = shared.grams[warp];
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
  const double norm = largest_root(WarpGroup(), gram, shared.rotations[warp], side, sweeps_for(filter));
  if (lane == 0) store_norm(output, wide, filter, norm, factor);
}

// n > 9, by one block: a warp per entry of the Gram matrix.
template <typename scalar_t>
__device__ __forceinline__ void block_norm(const Filter<scalar_t>& filter, double* gram,
                                           core::Rotation<double>* rotations, void* output, bool wide) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int side = filter.short_size + filter.short_size % 2;
  const double factor = range_factor(filter);
  for (int entry = warp; entry < side * side; entry += kWarpsPerBlock) {
    const int row = entry / side, column = entry % side;
    if (column < row) continue;
    double sum = 0;
    for (int64_t l = lane; column < filter.short_size && l < filter.long_size; l += kWarpSize) {
      sum =
          fma(static_cast<double>(filter.at(row, l)) * factor, static_cast<double>(filter.at(column, l)) * factor, sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) gram[row * side + column] = gram[column * side + row] = sum;
  }
  __syncthreads();
  // Jacobi converges quadratically: the sweeps for n = 49 need few more for any n of a kernel window.
  const int sweeps = sweeps_for(filter) + (filter.short_size > core::kJacobiMax ? 3 : 0);
  const double norm = largest_root(BlockGroup(), gram, rotations, side, sweeps);
  if (threadIdx.x == 0) store_norm(output, wide, filter, norm, factor);
  __syncthreads();  // the next filter overwrites the matrix that other threads may still read
}

// Every block finds its class, and its filters in it. `workspace`: per block of kWorkspace a matrix, followed by the
// rotations.
__global__ void __launch_bounds__(kThreads, 3)
    norms_kernel(const WeightTable* __restrict__ table, const __grid_constant__ Work work, void* output, bool wide,
                 double* workspace) {
  __shared__ Shared shared;
  int size = 0, block = static_cast<int>(blockIdx.x);
  while (block >= work.classes[size].blocks) block -= work.classes[size++].blocks;
  const ClassWork own = work.classes[size];
  table += own.first_weight;
  if (size == kWarp || size == kVector) {
    const int64_t index = static_cast<int64_t>(block) * kWarpsPerBlock + threadIdx.x / kWarpSize;
    if (index >= own.filters) return;  // the whole warp leaves; only warps are synchronised below
    const WeightTable& weight = find_weight(table, own.weights, index);
    with_type(weight.dtype, [&](auto type) {
      const auto filter = filter_of<typename decltype(type)::type>(weight, index);
      if (size == kVector) {
        vector_norm(filter, output, wide);
      } else {
        warp_norm(filter, shared.warp, output, wide);
      }
    });
    return;
  }
  for (int64_t index = block; index < own.filters; index += own.blocks) {
    const WeightTable& weight = find_weight(table, own.weights, index);
    double* gram = shared.block.gram;
    auto* rotations = shared.block.rotations;
    if (size == kWorkspace) {
      const int64_t side = weight.short_size + weight.short_size % 2;
      gram = workspace + block * work.workspace_stride;
      rotations = reinterpret_cast<core::Rotation<double>*>(gram + side * side);
    }
    with_type(weight.dtype, [&](auto type) {
      block_norm(filter_of<typename decltype(type)::type>(weight, index), gram, rotations, output, wide);
    });
  }
}

SizeClass size_class(int64_t side) {
  return side <= 1 ? kVector : side <= kWarpSide ? kWarp : side <= core::kJacobiMax ? kBlock : kWorkspace;
}

// Weight with its window axes (the last two) collapsible into one, which holds for every dense layout.
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
  entry.dtype = weight.scalar_type();
  entry.stacks = stacked ? weight.size(0) : 1;
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
    entry.scale_dtype = scale->scalar_type();
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

// The table with its classes one after another, and the work of their blocks.
Work arrange(std::vector<WeightTable>& table) {
  // Long filters come first within a class, so that the last blocks are short.
  std::stable_sort(table.begin(), table.end(), [](const WeightTable& a, const WeightTable& b) {
    const SizeClass of_a = size_class(a.short_size), of_b = size_class(b.short_size);
    return of_a != of_b ? of_a < of_b : a.long_size > b.long_size;
  });
  Work work{};
  int64_t largest = 0;
  for (size_t i = 0; i < table.size(); ++i) {
    const SizeClass size = size_class(table[i].short_size);
    ClassWork& own = work.classes[size];
    if (own.weights++ == 0) own.first_weight = static_cast<int>(i);
    table[i].begin = own.filters;
    own.filters += table[i].stacks * table[i].filters;
    if (size == kWorkspace) largest = std::max<int64_t>(largest, table[i].short_size + table[i].short_size % 2);
  }
  work.workspace_stride = largest * largest + 3 * (largest / 2);
  const int64_t fitting = std::max<int64_t>(kWorkspaceDoubles / std::max<int64_t>(work.workspace_stride, 1), 1);
  for (int size = 0; size < kNumClasses; ++size) {
    ClassWork& own = work.classes[size];
    const int64_t blocks = size == kWorkspace ? std::min({own.filters, kWorkspaceBlocks, fitting})
                           : size == kBlock   ? std::min(own.filters, kMostBlocks)
                                              : ceil_div(own.filters, kWarpsPerBlock);
    BDP_CHECK(blocks <= std::numeric_limits<int32_t>::max() / kNumClasses,
              "too many filters for one launch: ", own.filters);
    own.blocks = static_cast<int>(blocks);
  }
  return work;
}

Tensor filter_spectral_norms(const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& scales) {
  BDP_CHECK(!weights.empty() && weights.size() == scales.size(), "expected one scale (or None) per weight, got ",
            weights.size(), " weights and ", scales.size(), " scales");
  const DeviceGuard guard(weights[0].get_device_index());
  std::vector<WeightTable> table;
  std::vector<Tensor> alive;  // copies that the kernel reads
  int64_t num_filters = 0;
  bool wide = false;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_weight(weights[i], scales[i], weights[0]);
    alive.push_back(with_flat_window(weights[i]));
    const Tensor& weight = alive.back();
    BDP_CHECK(is_floating(weight.scalar_type()), "a weight must be float16, bfloat16, float32 or float64");
    wide = wide || weight.scalar_type() == ScalarType::Double;
    WeightTable entry = describe(weight, scales[i]);
    entry.output = num_filters;
    num_filters += entry.stacks * entry.filters;
    if (entry.stacks * entry.filters > 0) table.push_back(entry);
  }
  Tensor output = empty_on_device(num_filters, wide ? ScalarType::Double : ScalarType::Float, weights[0]);
  if (num_filters == 0) return output;

  const Work work = arrange(table);
  int64_t blocks = 0;
  for (const ClassWork& own : work.classes) blocks += own.blocks;
  const size_t bytes = table.size() * sizeof(WeightTable);
  const Tensor device = empty_on_device(static_cast<int64_t>(bytes), ScalarType::Byte, weights[0]);
  const Tensor workspace =
      empty_on_device(work.classes[kWorkspace].blocks * work.workspace_stride, ScalarType::Double, weights[0]);
  const cudaStream_t stream = current_stream(weights[0]);
  // From pageable memory the copy is staged before the call returns, so `table` may go out of scope. A graph would
  // read it again at every replay.
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  BDP_CHECK(capture == cudaStreamCaptureStatusNone, "filter_spectral_norms cannot be captured in a CUDA graph");
  STD_CUDA_CHECK(cudaMemcpyAsync(device.data_ptr(), table.data(), bytes, cudaMemcpyHostToDevice, stream));
  launch(norms_kernel, dim3(blocks), dim3(kThreads), stream, static_cast<const WeightTable*>(device.data_ptr()), work,
         output.data_ptr(), wide, static_cast<double*>(workspace.data_ptr()));
  return output;
}

}  // namespace
}  // namespace bdprune::cuda

STABLE_TORCH_LIBRARY_IMPL(bdprune, CUDA, m)
{
  m.impl("filter_spectral_norms", TORCH_BOX(&bdprune::cuda::filter_spectral_norms));
}
