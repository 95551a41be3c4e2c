// stacked_conv2d and its backward on CUDA: the masked convolutions of G models as one implicit matrix product.
//
// A block computes a tile of 64 positions x 64 channels of one model and one group. It loops over the summed channels
// in chunks of 32 and over each chunk's taps, stages both operands in shared memory in the format of the tensor cores
// (TF32, or float16 and bfloat16 unchanged), and sums in float32. There are two stages: while one is multiplied, the
// numbers of the next are loaded from global memory into registers, which works for any layout and dtype. Tensors are
// read and written in place: NCHW, channels_last, weights in any order, and one weight for all models only differ in
// strides and in the adjacent elements that a thread reads, 16 bytes at a time if possible. The mask is part of the
// product. In the forward pass the epilogue multiplies by it, and a tile with only zero masks is not computed. In the
// gradient the staging multiplies by it, and a chunk with only zero masks is skipped. (So 0 * Inf is 0 there.) No sum
// uses atomics: results are reproducible bit for bit, and a stack gives the bits of its models.
//
// The gradient of the mask, the sum of grad * z, is computed in the launch of the input gradient. So the backward pass
// reads grad and z once, and writes the input's gradient once, in addition to the weights. A block sums over the piece
// of grad that its own taps read, so the L2 cache serves the second read; a separate launch would load grad again. z
// cannot be computed from y = mask * z if the mask is 0, so it is kept.
#include <algorithm>
#include <array>
#include <limits>

#include "../core/implicit_gemm.h"
#include "mma.cuh"
#include "partial_sums.cuh"

namespace bdprune::cuda {
namespace {

using core::kConvColumns, core::kConvDepth, core::kConvRows, core::kConvThreads;

constexpr int kRowFragments = 2, kColumnFragments = 4;  // of 16 rows and of 8 columns, per warp; 2 x 2 warps per tile
constexpr int kConvWarps = kConvThreads / kWarpSize;
constexpr int kStaged = kConvRows * kConvDepth / kConvThreads;  // elements of an operand that a thread stages

// How the operands are multiplied. kExact: float32 without tensor cores.
enum class Math { kExact, kTensor };

// Target number of blocks per multiprocessor, which limits their registers. The exact product is for checks.
template <Math kMath>
constexpr int kBlocksEach = kMath == Math::kExact ? 2 : 3;

// The order in which threads read an operand: adjacent threads along its lines (rows or columns of the product), or
// along the depth, with single elements or whole vectors.
enum class Order { kLines, kDepth, kVectors };

// A stack of maps [maps, samples, channels, positions] by strides; if all models share one map, its map stride is 0.
struct MapStrides {
  int64_t map, sample, channel, position;
};

struct ConvCall {
  core::ConvShape shape;
  MapStrides source, result;
  int64_t rows;            // of the product: samples times positions of a result map
  int64_t columns, depth;  // channels of the result and of the source, in one group
  int64_t row_positions;   // positions of a result map
  int64_t row_tiles, column_tiles, groups;
  int64_t weight_map, weight_group, weight_column, weight_depth, weight_tap_y, weight_tap_x;  // strides
  Order source_order, weight_order;
  core::MaskSplit split;     // of the gradient
  int64_t source_positions;  // of a source map
  bool source_channels_fastest;
};

// Pitch of a line of an operand in shared memory: a warp's fragment loads use 32 different banks, and a line starts at
// a multiple of a vector.
template <typename scalar_t>
constexpr int kPitch = kConvDepth + (sizeof(scalar_t) == 2 ? 8 : 4);

template <typename scalar_t>
constexpr int kVector = kVectorBytes / sizeof(scalar_t);

template <typename scalar_t>
struct alignas(kVectorBytes) Operands {
  scalar_t rows[kConvRows][kPitch<scalar_t>];
  scalar_t columns[kConvColumns][kPitch<scalar_t>];
  int64_t sources[kConvRows];  // offset of each row's channel 0 in the current step, or -1
  float factors[kConvDepth];   // of the gradient: the masks of the chunk
};

// The row of the product that a thread locates in every step.
struct Row {
  int64_t sample;  // its offset in the source; -1 if there is no such row
  int y, x;
};

template <bool kGradient>
__device__ __forceinline__ Row row_of(const ConvCall& call, int64_t row) {
  if (row >= call.rows) return {-1, 0, 0};
  const int64_t sample = row / call.row_positions;
  const int position = static_cast<int>(row - sample * call.row_positions);
  const int width = kGradient ? call.shape.width : call.shape.out_width;
  return {sample * call.source.sample, position / width, position % width};
}

template <bool kGradient, typename scalar_t>
__device__ __forceinline__ void locate(Operands<scalar_t>& tile, const ConvCall& call, const Row& row,
                                       const core::ConvWalk& step) {
  const int spare = static_cast<int>(threadIdx.x) - kConvRows;
  if (kGradient && spare >= 0 && spare < kConvDepth) {
    const int64_t channel = step.first + spare;
    tile.factors[spare] = channel < step.depth ? step.mask[channel] : 0;
  }
  if (spare >= 0) return;
  const int64_t at =
      row.sample < 0 ? -1 : core::source_position<kGradient>(call.shape, row.y, row.x, step.tap_y, step.tap_x);
  tile.sources[threadIdx.x] = at < 0 ? -1 : row.sample + at * call.source.position;
}

// Loads a thread's part of an operand, whose line starts at offset(line) of `data`, or is all 0 if that is -1.
template <typename scalar_t, typename Offset>
__device__ __forceinline__ void fetch(scalar_t (&values)[kStaged], const scalar_t* __restrict__ data, Order order,
                                      int64_t stride, int64_t first_depth, int64_t depth, Offset&& offset) {
  constexpr int kWidth = kVector<scalar_t>;
  if (order == Order::kLines) {
    // A thread stays on its line and advances along it in equal steps.
    const core::StagePlace start = core::stage_by_line(threadIdx.x, 0);
    constexpr int kDown = core::stage_by_line(0, 1).depth;
    const int64_t line = offset(start.line);
    const int left =
        line < 0 ? 0 : static_cast<int>(depth - first_depth < kConvDepth ? depth - first_depth : kConvDepth);
    const scalar_t* at = data + line + (first_depth + start.depth) * stride;
#pragma unroll
    for (int i = 0; i < kStaged; ++i, at += kDown * stride) {
      values[i] = start.depth + i * kDown < left ? *at : static_cast<scalar_t>(0);
    }
    return;
  }
#pragma unroll
  for (int turn = 0; turn < kStaged / kWidth; ++turn) {
    const core::StagePlace place = core::stage_by_depth<kWidth>(threadIdx.x, turn);
    const int64_t line = offset(place.line), channel = first_depth + place.depth;
    if (order == Order::kVectors) {
      Vector<scalar_t, kWidth> vector = {};
      if (line >= 0 && channel < depth) {
        vector = *reinterpret_cast<const Vector<scalar_t, kWidth>*>(data + line + channel);
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[turn * kWidth + i] = vector.value[i];
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        values[turn * kWidth + i] =
            line >= 0 && channel + i < depth ? data[line + (channel + i) * stride] : static_cast<scalar_t>(0);
      }
    }
  }
}

// The number in the format of the tensor cores; in the gradient, times its channel's mask.
template <Math kMath, bool kMasked, typename scalar_t>
__device__ __forceinline__ scalar_t as_operand(scalar_t value, const float* factor) {
  if constexpr (kMasked) value = static_cast<scalar_t>(static_cast<float>(value) * *factor);
  if constexpr (kMath == Math::kTensor && std::is_same_v<scalar_t, float>) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = core::round_to_tf32(bits);
    memcpy(&value, &bits, sizeof bits);
  }
  return value;
}

// Writes the fetched values to shared memory.
template <Math kMath, bool kMasked, typename scalar_t>
__device__ __forceinline__ void store(scalar_t (*lines)[kPitch<scalar_t>], const scalar_t (&values)[kStaged],
                                      Order order, const float* factors) {
  constexpr int kWidth = kVector<scalar_t>;
  if (order == Order::kLines) {
#pragma unroll
    for (int i = 0; i < kStaged; ++i) {
      const core::StagePlace place = core::stage_by_line(threadIdx.x, i);
      lines[place.line][place.depth] = as_operand<kMath, kMasked>(values[i], factors + place.depth);
    }
    return;
  }
#pragma unroll
  for (int turn = 0; turn < kStaged / kWidth; ++turn) {
    const core::StagePlace place = core::stage_by_depth<kWidth>(threadIdx.x, turn);
    Vector<scalar_t, kWidth> vector;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      vector.value[i] = as_operand<kMath, kMasked>(values[turn * kWidth + i], factors + place.depth + i);
    }
    *reinterpret_cast<Vector<scalar_t, kWidth>*>(&lines[place.line][place.depth]) = vector;
  }
}

using Sums = float[kRowFragments][kColumnFragments][4];

template <typename scalar_t>
__device__ __forceinline__ uint32_t register_at(const scalar_t* place) {
  uint32_t bits;
  memcpy(&bits, place, sizeof bits);
  return bits;
}

// sums += the tile's product, by a warp whose part starts at (row, column).
template <Math kMath, typename scalar_t>
__device__ __forceinline__ void multiply(const Operands<scalar_t>& tile, Sums& sums, int row, int column) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kMath == Math::kTensor) {
    constexpr bool kWide = std::is_same_v<scalar_t, float>;
    constexpr int kStep = kWide ? 8 : 16;
#pragma unroll
    for (int k = 0; k < kConvDepth; k += kStep) {
      uint32_t a[kRowFragments][4], b[kColumnFragments][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const core::Place at = kWide ? core::a_place_k8(lane, i) : core::a_place_k16(lane, 2 * i);
#pragma unroll
        for (int f = 0; f < kRowFragments; ++f) a[f][i] = register_at(&tile.rows[row + 16 * f + at.row][k + at.column]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const core::Place at = kWide ? core::b_place_k8(lane, i) : core::b_place_k16(lane, 2 * i);
#pragma unroll
        for (int f = 0; f < kColumnFragments; ++f) {
          b[f][i] = register_at(&tile.columns[column + 8 * f + at.column][k + at.row]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnFragments; ++j) {
          if constexpr (kWide) {
            mma_tf32(sums[i][j], a[i], b[j]);
          } else {
            mma_16bit(sums[i][j], a[i], b[j], scalar_t{});
          }
        }
      }
    }
  } else {
    // The same elements of the tile as a tensor core would give this lane.
#pragma unroll 4
    for (int k = 0; k < kConvDepth; ++k) {
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnFragments; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const core::Place at = core::c_place(lane, e);
            sums[i][j][e] = fma(static_cast<float>(tile.rows[row + 16 * i + at.row][k]),
                                static_cast<float>(tile.columns[column + 8 * j + at.column][k]), sums[i][j][e]);
          }
        }
      }
    }
  }
}

// partial[split, c] = sum of grad * z over this block's share of positions, for its share of the group's channels c:
// `channels` of them start at `grad`, `z` and `partial`. Lanes run along the contiguous one of the two axes.
template <typename scalar_t>
__device__ __forceinline__ void sum_for_mask(const ConvCall& call, const core::ConvTile& at,
                                             const scalar_t* __restrict__ grad, const scalar_t* __restrict__ z,
                                             double* __restrict__ partial) {
  __shared__ double shares[kConvWarps][kWarpSize];
  const core::MaskSplit& split = call.split;
  const int64_t own = split.of(at.row_tile);
  if (own < 0) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t begin = own * split.rows_each;
  const int64_t end = begin + split.rows_each < split.rows ? begin + split.rows_each : split.rows;
  const int64_t first = at.column_tile * split.channels_each;
  const int64_t last = first + split.channels_each < split.channels ? first + split.channels_each : split.channels;
  if (call.source_channels_fastest) {
    for (int64_t base = first; base < last; base += kWarpSize) {
      const int64_t channel = base + lane;
      double sum = 0;
#pragma unroll 4
      for (int64_t row = begin + warp; channel < last && row < end; row += kConvWarps) {
        const int64_t place = row * call.source.position + channel;
        sum = fma(static_cast<double>(grad[place]), static_cast<double>(z[place]), sum);
      }
      shares[warp][lane] = sum;
      __syncthreads();
      if (warp == 0 && channel < last) {
        for (int other = 1; other < kConvWarps; ++other) sum += shares[other][lane];
        partial[channel] = sum;
      }
      __syncthreads();
    }
    return;
  }
  const int64_t first_sample = (begin + lane) / call.source_positions;
  const int64_t first_position = begin + lane - first_sample * call.source_positions;
  for (int64_t channel = first + warp; channel < last; channel += kConvWarps) {
    double sum = 0;
    int64_t sample = first_sample, position = first_position;
    for (int64_t row = begin + lane; row < end; row += kWarpSize) {
      const int64_t place = sample * call.source.sample + channel * call.source.channel + position;
      sum = fma(static_cast<double>(grad[place]), static_cast<double>(z[place]), sum);
      for (position += kWarpSize; position >= call.source_positions; position -= call.source_positions) ++sample;
    }
    sum = warp_sum(sum);
    if (lane == 0) partial[channel] = sum;
  }
}

// Block: one tile. Forward: y = mask * (x * weight + bias), and the unmasked z if requested. kGradient: y = the
// gradient of the input, computed from the gradient x of the output; and, if z is given, `partial` [splits, maps,
// channels of x].
template <Math kMath, bool kGradient, typename scalar_t>
__global__ void __launch_bounds__(kConvThreads, kBlocksEach<kMath>)
    conv_kernel(const scalar_t* __restrict__ x, const scalar_t* __restrict__ weight, const float* __restrict__ mask,
                const float* __restrict__ bias, scalar_t* __restrict__ y, scalar_t* __restrict__ z,
                double* __restrict__ partial, const __grid_constant__ ConvCall call) {
  __shared__ Operands<scalar_t> tiles[2];
  const core::ConvTile at = core::conv_tile(blockIdx.x, call.row_tiles, call.column_tiles, call.groups);
  const int64_t first_row = at.row_tile * kConvRows, first_column = at.column_tile * kConvColumns;
  // Masks and biases belong to output channels: the columns of the forward product, the depth of the gradient.
  const int64_t masked = kGradient ? call.depth : call.columns;
  const int64_t first_mask = (at.map * call.groups + at.group) * masked;
  mask += first_mask;
  const int64_t source = at.map * call.source.map + at.group * call.depth * call.source.channel;
  x += source;
  weight += at.map * call.weight_map + at.group * call.weight_group;
  if constexpr (kGradient) {
    if (partial) {
      const int64_t channels = gridDim.x / (call.row_tiles * call.column_tiles) * call.depth;
      sum_for_mask(call, at, x, z + source, partial + call.split.of(at.row_tile) * channels + first_mask);
    }
  }

  Sums sums = {};
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int row = warp / 2 * 32, column = warp % 2 * 32;
  const int64_t last_column = first_column + kConvColumns < call.columns ? first_column + kConvColumns : call.columns;
  const bool skipped = !kGradient && !z && core::all_zero(mask, first_column, last_column);

  const Row own = row_of<kGradient>(call, first_row + threadIdx.x % kConvRows);
  core::ConvWalk step(skipped ? 0 : call.depth, kGradient ? mask : nullptr);
  scalar_t row_values[kStaged], column_values[kStaged];
  const auto fetch_both = [&](const Operands<scalar_t>& tile) {
    fetch(row_values, x, call.source_order, call.source.channel, step.first, call.depth,
          [&](int line) { return tile.sources[line]; });
    const int64_t tap = step.tap_y * call.weight_tap_y + step.tap_x * call.weight_tap_x;
    fetch(column_values, weight, call.weight_order, call.weight_depth, step.first, call.depth, [&](int line) {
      return first_column + line < call.columns ? (first_column + line) * call.weight_column + tap : -1;
    });
  };
  if (!step.done()) {
    locate<kGradient>(tiles[0], call, own, step);
    __syncthreads();
    fetch_both(tiles[0]);
  }
  // One barrier per step is enough: a stage is overwritten only after the barrier of the step in between, which no
  // thread passes before it has multiplied the stage.
  for (int stage = 0; !step.done(); stage ^= 1) {
    Operands<scalar_t>& tile = tiles[stage];
    store<kMath, kGradient>(tile.rows, row_values, call.source_order, tile.factors);
    store<kMath, false>(tile.columns, column_values, call.weight_order, tile.factors);
    step.next(call.shape);
    if (!step.done()) locate<kGradient>(tiles[stage ^ 1], call, own, step);
    __syncthreads();
    if (!step.done()) fetch_both(tiles[stage ^ 1]);
    multiply<kMath>(tile, sums, row, column);
  }

  const int64_t result = at.map * call.result.map + at.group * call.columns * call.result.channel;
#pragma unroll
  for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = first_row + row + 16 * i + core::c_place(lane, 2 * half).row;
      if (r >= call.rows) continue;
      const int64_t sample = r / call.row_positions, position = r - sample * call.row_positions;
      const int64_t place = result + sample * call.result.sample + position * call.result.position;
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t c = first_column + column + 8 * j + core::c_place(lane, e).column;
          if (c >= call.columns) continue;
          float value = sums[i][j][2 * half + e];
          if constexpr (kGradient) {
            y[place + c * call.result.channel] = static_cast<scalar_t>(value);
          } else {
            if (bias && !skipped) value += bias[first_mask + c];
            // Rounded before multiplying by the mask, so that y equals channel_scale of z.
            const scalar_t unmasked = static_cast<scalar_t>(value);
            if (z) z[place + c * call.result.channel] = unmasked;
            y[place + c * call.result.channel] = static_cast<scalar_t>(static_cast<float>(unmasked) * mask[c]);
          }
        }
      }
    }
  }
}

// The checked arguments of both ops.
struct ConvSetting {
  int64_t maps, groups, channels, out_channels;  // channels of the input and of the output, all groups
  core::ConvShape shape;
};

// Size of the output along an axis.
int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  for (const int64_t number : {size, kernel, stride, pad, dilation}) {
    BDP_CHECK(number <= core::kConvLargest, "sizes, strides, paddings and dilations must be below 2^30, got ", number);
  }
  BDP_CHECK(stride > 0 && dilation > 0 && pad >= 0, "stride and dilation must be positive, and padding not negative");
  BDP_CHECK(kernel > 0 && size + 2 * pad >= dilation * (kernel - 1) + 1, "the kernel is larger than the padded input");
  BDP_CHECK(size + 2 * pad <= core::kConvLargest, "the padded input must be below 2^30, got ", size + 2 * pad);
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

ConvSetting setting_of(const Tensor& weight, const Tensor& mask, int64_t height, int64_t width,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation, int64_t groups) {
  BDP_CHECK(weight.dim() == 5, "weight must be [G, O, I, kh, kw], got ", weight.dim(), " dimensions");
  BDP_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
            "stride, padding and dilation must have two numbers each");
  BDP_CHECK(groups > 0 && weight.size(1) % groups == 0, "groups must divide ", weight.size(1), ", got ", groups);
  BDP_CHECK(mask.scalar_type() == ScalarType::Float && mask.is_contiguous() && mask.dim() == 2 &&
                mask.size(1) == weight.size(1),
            "mask must be contiguous float32 [G, O]");
  BDP_CHECK(weight.size(0) == 1 || weight.size(0) == mask.size(0), "weight must be for one model or for ", mask.size(0),
            ", got ", weight.size(0));
  const int64_t kernel_height = weight.size(3), kernel_width = weight.size(4);
  const int64_t out_height = out_size(height, kernel_height, stride[0], padding[0], dilation[0]);
  const int64_t out_width = out_size(width, kernel_width, stride[1], padding[1], dilation[1]);
  const auto narrow = [](int64_t number) { return static_cast<int>(number); };  // checked by out_size
  const core::ConvShape shape{narrow(height),        narrow(width),        narrow(out_height),  narrow(out_width),
                              narrow(kernel_height), narrow(kernel_width), narrow(stride[0]),   narrow(stride[1]),
                              narrow(padding[0]),    narrow(padding[1]),   narrow(dilation[0]), narrow(dilation[1])};
  return {mask.size(0), groups, weight.size(2) * groups, weight.size(1), shape};
}

bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kVectorBytes == 0; }

// Whether every stride is a multiple of a vector.
template <size_t kCount>
bool whole_vectors(const Tensor& tensor, const std::array<int64_t, kCount>& strides) {
  const int64_t width = tensor.scalar_type() == ScalarType::Float ? kVector<float> : kVector<torch::headeronly::Half>;
  return is_aligned(tensor) && std::all_of(strides.begin(), strides.end(), [&](int64_t s) { return s % width == 0; });
}

void read_source(ConvCall& call, const Stack& source) {
  const MapStrides& strides = call.source;
  call.source_positions = source.map.positions;
  call.source_channels_fastest = source.map.channels_fastest;
  const std::array all{strides.map, strides.sample, strides.position, call.depth};
  call.source_order = !source.map.channels_fastest            ? Order::kLines
                      : whole_vectors(source.map.tensor, all) ? Order::kVectors
                                                              : Order::kDepth;
}

// The weight [G or 1, O, I / groups, kh, kw] with any strides.
template <bool kGradient>
void read_weight(ConvCall& call, const Tensor& weight) {
  const auto stride = [&](int64_t axis) { return weight.size(axis) > 1 ? weight.stride(axis) : 0; };
  call.weight_map = stride(0);
  call.weight_column = stride(kGradient ? 2 : 1);
  call.weight_depth = stride(kGradient ? 1 : 2);
  call.weight_group = (kGradient ? call.depth : call.columns) * stride(1);
  call.weight_tap_y = stride(3);
  call.weight_tap_x = stride(4);
  const std::array all{call.weight_map,   call.weight_group, call.weight_column,
                       call.weight_tap_y, call.weight_tap_x, call.depth};
  call.weight_order = call.weight_depth == 1 && whole_vectors(weight, all) ? Order::kVectors
                      : call.weight_depth <= call.weight_column            ? Order::kDepth
                                                                           : Order::kLines;
}

MapStrides strides_of(const Stack& stack) {
  const int64_t c = stack.map.channels, p = stack.map.positions, n = stack.samples();
  if (stack.map.channels_fastest) return {n * c * p, c * p, 1, c};
  return {n * c * p, c * p, p, 1};
}

// Fills in the arguments common to both directions, and launches. `map` is the stack of maps of `y`.
template <bool kGradient>
void run(ConvCall& call, const ConvSetting& setting, bool exact, const Stack& source, bool shared, const Tensor& weight,
         const Tensor& mask, const OptionalTensor& bias, const FeatureMap& map, const Tensor* z, Tensor* partial) {
  const int64_t per_group = setting.out_channels / setting.groups;
  call.shape = setting.shape;
  call.source = strides_of(source);
  if (shared) call.source.map = 0;
  call.result = strides_of({map, setting.maps});
  call.groups = setting.groups;
  call.columns = kGradient ? setting.channels / setting.groups : per_group;
  call.depth = kGradient ? per_group : setting.channels / setting.groups;
  call.row_positions = map.positions;
  call.rows = map.samples / setting.maps * map.positions;
  call.row_tiles = ceil_div(call.rows, kConvRows);
  call.column_tiles = ceil_div(call.columns, kConvColumns);
  read_source(call, source);
  read_weight<kGradient>(call, weight);
  if (partial) {
    call.split =
        core::MaskSplit(source.samples() * source.map.positions, call.depth, call.row_tiles, call.column_tiles);
    *partial = empty_on_device(call.split.splits * mask.numel(), ScalarType::Double, mask);
  }
  const int64_t blocks = setting.maps * setting.groups * call.column_tiles * call.row_tiles;
  BDP_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "too many tiles for one launch: ", blocks);
  const auto go = [&](auto math, auto type) {
    using scalar_t = typename decltype(type)::type;
    launch(conv_kernel<decltype(math)::value, kGradient, scalar_t>, dim3(blocks), dim3(kConvThreads),
           current_stream(mask), static_cast<const scalar_t*>(source.map.tensor.data_ptr()),
           static_cast<const scalar_t*>(weight.data_ptr()), static_cast<const float*>(mask.data_ptr()),
           bias ? static_cast<const float*>(bias->data_ptr()) : nullptr, static_cast<scalar_t*>(map.tensor.data_ptr()),
           z ? static_cast<scalar_t*>(z->data_ptr()) : nullptr,
           partial ? static_cast<double*>(partial->data_ptr()) : nullptr, call);
  };
  using Exact = std::integral_constant<Math, Math::kExact>;
  using OnTensorCores = std::integral_constant<Math, Math::kTensor>;
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return exact ? go(Exact{}, Type<float>{}) : go(OnTensorCores{}, Type<float>{});
    case ScalarType::Half:
      return go(OnTensorCores{}, Type<torch::headeronly::Half>{});
    default:
      BDP_CHECK(weight.scalar_type() == ScalarType::BFloat16, "x must be float16, bfloat16 or float32");
      return go(OnTensorCores{}, Type<torch::headeronly::BFloat16>{});
  }
}

std::tuple<Tensor, Tensor> stacked_conv2d(const Tensor& x, const Tensor& weight, const Tensor& mask,
                                          const OptionalTensor& bias, std::vector<int64_t> stride,
                                          std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                                          bool need_z, bool exact) {
  check_same_device(weight, x, "weight");
  check_same_device(mask, x, "mask");
  BDP_CHECK(x.dim() == 4 || x.dim() == 5, "x must be [N, I, H, W] or [G, N, I, H, W], got ", x.dim(), " dimensions");
  BDP_CHECK(x.scalar_type() == weight.scalar_type(), "x and weight must have the same dtype");
  const bool stacked = x.dim() == 5;
  const ConvSetting setting =
      setting_of(weight, mask, x.size(x.dim() - 2), x.size(x.dim() - 1), stride, padding, dilation, groups);
  BDP_CHECK(x.size(x.dim() - 3) == setting.channels && (!stacked || x.size(0) == setting.maps),
            "x does not match a weight of ", setting.maps, " models with ", setting.channels, " input channels");
  if (bias) {
    check_same_device(*bias, x, "bias");
    BDP_CHECK(bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->numel() == mask.numel(),
              "bias must be contiguous float32 [G, O]");
  }
  const DeviceGuard guard(x.get_device_index());
  const Stack source = as_stack(x, stacked);
  const int64_t samples = source.samples(), height = setting.shape.out_height, width = setting.shape.out_width;
  const bool fastest = source.map.channels_fastest;
  const auto maps = [&](int64_t count) {
    return new_maps(x, count * samples, setting.out_channels, height, width, fastest);
  };
  const Tensor y = maps(setting.maps);
  const Tensor z = need_z ? maps(setting.maps) : empty_on_device(0, x.scalar_type(), x);
  const std::vector<int64_t> sizes{setting.maps, samples, setting.out_channels, height, width};
  if (y.numel() > 0) {
    ConvCall call{};
    const FeatureMap map{y, setting.maps * samples, setting.out_channels, height * width, fastest};
    run<false>(call, setting, exact, source, !stacked, weight, mask, bias, map, need_z ? &z : nullptr, nullptr);
  }
  return {torch::stable::reshape(y, sizes), need_z ? torch::stable::reshape(z, sizes) : z};
}

std::tuple<Tensor, Tensor> stacked_conv2d_backward(const Tensor& grad, const OptionalTensor& z, const Tensor& weight,
                                                   const Tensor& mask, int64_t height, int64_t width,
                                                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                   std::vector<int64_t> dilation, int64_t groups, bool exact) {
  check_same_device(weight, grad, "weight");
  check_same_device(mask, grad, "mask");
  BDP_CHECK(grad.scalar_type() == weight.scalar_type(), "grad and weight must have the same dtype");
  const ConvSetting setting = setting_of(weight, mask, height, width, stride, padding, dilation, groups);
  const core::ConvShape& shape = setting.shape;
  BDP_CHECK(grad.dim() == 5 && grad.size(0) == setting.maps && grad.size(2) == setting.out_channels &&
                grad.size(3) == shape.out_height && grad.size(4) == shape.out_width,
            "grad must be [", setting.maps, ", N, ", setting.out_channels, ", ", shape.out_height, ", ",
            shape.out_width, "]");
  if (z) {
    check_same_device(*z, grad, "z");
    BDP_CHECK(z->scalar_type() == grad.scalar_type() && z->sizes().vec() == grad.sizes().vec(),
              "z must have the dtype and the shape of grad");
  }
  const DeviceGuard guard(grad.get_device_index());
  Stack source = as_stack(grad, true);
  FeatureMap unmasked = source.map;
  if (z) {
    unmasked = as_stack(*z, true).map;
    source.map = {in_layout_of(unmasked, source.map), unmasked.samples, unmasked.channels, unmasked.positions,
                  unmasked.channels_fastest};
  }
  const int64_t samples = source.samples();
  const bool fastest = source.map.channels_fastest;
  const Tensor result = new_maps(grad, setting.maps * samples, setting.channels, height, width, fastest);
  Tensor grad_mask = z ? torch::stable::new_zeros(mask, mask.sizes()) : empty_on_device(0, ScalarType::Float, mask);
  if (result.numel() > 0) {
    ConvCall call{};
    const FeatureMap map{result, setting.maps * samples, setting.channels, height * width, fastest};
    Tensor partial;
    const bool need_mask = z && grad.numel() > 0;
    run<true>(call, setting, exact, source, false, weight, mask, std::nullopt, map,
              need_mask ? &unmasked.tensor : nullptr, need_mask ? &partial : nullptr);
    if (need_mask) merge_into(grad_mask, partial);
  }
  return {torch::stable::reshape(result, {setting.maps, samples, setting.channels, height, width}), grad_mask};
}

}  // namespace
}  // namespace bdprune::cuda

STABLE_TORCH_LIBRARY_IMPL(bdprune, CUDA, m)
{
  m.impl("stacked_conv2d", TORCH_BOX(&bdprune::cuda::stacked_conv2d));
  m.impl("stacked_conv2d_backward", TORCH_BOX(&bdprune::cuda::stacked_conv2d_backward));
}
