// stacked_conv2d and its input gradient on CUDA: the masked convolutions of G models as one implicit matrix product.
//
// A block makes a tile of kTileRows positions x kTileColumns channels of one model and one group. It walks the summed
// channels in chunks of kTileDepth and each chunk's taps, stages both operands in shared memory as the tensor cores
// take them (TF32, or float16 and bfloat16 as they are), and sums in float32. Tensors are read and written where they
// lie: NCHW and channels_last differ in their strides and in which neighbour a thread reads next. The mask is part of
// the product: forward, the epilogue multiplies by it, and a tile of which every mask is 0 is not computed at all; in
// the gradient the staging does, and a chunk of which every mask is 0 is left out. (So 0 * Inf is 0 there.) Nothing is
// summed across blocks: results repeat to the bit, and a stack gives the bits of its models.
#include <algorithm>
#include <limits>

#include "../core/implicit_gemm.h"
#include "mma.cuh"
#include "utils.cuh"

namespace bdprune::cuda {
namespace {

constexpr int kThreads = 128;  // 2 x 2 warps, each with 32 rows and 32 columns of the tile
constexpr int kTileRows = 64;
constexpr int kTileColumns = 64;
constexpr int kTileDepth = 32;
constexpr int kRowFragments = 2, kColumnFragments = 4;  // of 16 rows and of 8 columns, per warp

// How the operands are multiplied. kExact: float32 on the ordinary cores.
enum class Math { kExact, kTensor };

// A stack of maps [maps, samples, channels, positions] by strides; a stack of one map for all has map stride 0.
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
  int64_t weight_map, weight_group, weight_column, weight_depth;  // strides; a tap's is 1
  bool channels_fastest;                                          // of the source
};

// Pitch of a row of an operand in shared memory: a warp's fragment loads hit 32 different banks.
template <typename scalar_t>
constexpr int kPitch = kTileDepth + (sizeof(scalar_t) == 2 ? 8 : 4);

template <typename scalar_t>
struct Operands {
  scalar_t rows[kTileRows][kPitch<scalar_t>];
  scalar_t columns[kTileColumns][kPitch<scalar_t>];
  int64_t sources[kTileRows];  // where each row's channel 0 lies for the tap at hand, or -1
};

template <Math kMath, typename scalar_t>
__device__ __forceinline__ scalar_t as_operand(float value) {
  if constexpr (kMath == Math::kTensor && std::is_same_v<scalar_t, float>) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = core::round_to_tf32(bits);
    memcpy(&value, &bits, sizeof bits);
  }
  return static_cast<scalar_t>(value);
}

template <bool kGradient, typename scalar_t>
__device__ __forceinline__ void locate_rows(Operands<scalar_t>& tile, const ConvCall& call, int64_t first_row,
                                            int64_t tap) {
  const int r = threadIdx.x;
  if (r >= kTileRows) return;
  const int64_t row = first_row + r;
  int64_t source = -1;
  if (row < call.rows) {
    const int64_t sample = row / call.row_positions;
    const int64_t at = core::source_position<kGradient>(call.shape, row - sample * call.row_positions, tap);
    if (at >= 0) source = sample * call.source.sample + at * call.source.position;
  }
  tile.sources[r] = source;
}

template <Math kMath, bool kGradient, typename scalar_t>
__device__ __forceinline__ void stage(Operands<scalar_t>& tile, const ConvCall& call, const scalar_t* __restrict__ x,
                                      const scalar_t* __restrict__ weight, const float* __restrict__ mask,
                                      int64_t first_column, int64_t first_depth, int64_t tap) {
#pragma unroll 4
  for (int e = threadIdx.x; e < kTileRows * kTileDepth; e += kThreads) {
    const int r = call.channels_fastest ? e / kTileDepth : e % kTileRows;
    const int k = call.channels_fastest ? e % kTileDepth : e / kTileRows;
    const int64_t channel = first_depth + k;
    float value = 0;
    if (tile.sources[r] >= 0 && channel < call.depth) {
      value = static_cast<float>(x[tile.sources[r] + channel * call.source.channel]);
      if constexpr (kGradient) value *= mask[channel];
    }
    tile.rows[r][k] = as_operand<kMath, scalar_t>(value);
  }
#pragma unroll 4
  for (int e = threadIdx.x; e < kTileColumns * kTileDepth; e += kThreads) {
    const int c = e / kTileDepth, k = e % kTileDepth;
    const int64_t column = first_column + c, channel = first_depth + k;
    float value = 0;
    if (column < call.columns && channel < call.depth) {
      value = static_cast<float>(weight[column * call.weight_column + channel * call.weight_depth + tap]);
    }
    tile.columns[c][k] = as_operand<kMath, scalar_t>(value);
  }
}

using Sums = float[kRowFragments][kColumnFragments][4];

template <typename scalar_t>
__device__ __forceinline__ uint32_t register_at(const scalar_t* place) {
  uint32_t bits;
  memcpy(&bits, place, sizeof bits);
  return bits;
}

// sums += the tile's product, by a warp whose part begins at (row, column).
template <Math kMath, typename scalar_t>
__device__ __forceinline__ void multiply(const Operands<scalar_t>& tile, Sums& sums, int row, int column) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kMath == Math::kTensor) {
    constexpr bool kWide = std::is_same_v<scalar_t, float>;
    constexpr int kStep = kWide ? 8 : 16;
#pragma unroll
    for (int k = 0; k < kTileDepth; k += kStep) {
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
    // The same elements of the tile as a tensor core would leave with this lane.
#pragma unroll 4
    for (int k = 0; k < kTileDepth; ++k) {
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

// Whether every mask of [begin, end) is 0; all threads get the same answer.
__device__ __forceinline__ bool all_zero(const float* __restrict__ mask, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    if (mask[c] != 0) return false;
  }
  return true;
}

// Block: one tile. Forward: y = mask * (x * weight + bias), and the unmasked z where asked. kGradient: y = the gradient
// of the input from that of the output, x.
template <Math kMath, bool kGradient, typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    conv_kernel(const scalar_t* __restrict__ x, const scalar_t* __restrict__ weight, const float* __restrict__ mask,
                const float* __restrict__ bias, scalar_t* __restrict__ y, scalar_t* __restrict__ z, ConvCall call) {
  __shared__ Operands<scalar_t> tile;
  const core::ConvTile at = core::conv_tile(blockIdx.x, call.row_tiles, call.column_tiles, call.groups);
  const int64_t first_row = at.row_tile * kTileRows, first_column = at.column_tile * kTileColumns;
  // Masks and biases belong to output channels: the columns of the forward product, the depth of the gradient's.
  const int64_t masked = kGradient ? call.depth : call.columns;
  const int64_t first_mask = (at.map * call.groups + at.group) * masked;
  mask += first_mask;
  x += at.map * call.source.map + at.group * call.depth * call.source.channel;
  weight += at.map * call.weight_map + at.group * call.weight_group;

  Sums sums = {};
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int row = warp / 2 * 32, column = warp % 2 * 32;
  const int64_t last_column = first_column + kTileColumns < call.columns ? first_column + kTileColumns : call.columns;
  const bool skipped = !kGradient && !z && all_zero(mask, first_column, last_column);
  const int64_t depth = skipped ? 0 : call.depth, taps = call.shape.taps();
  for (int64_t first = 0; first < depth; first += kTileDepth) {
    if (kGradient && all_zero(mask, first, first + kTileDepth < depth ? first + kTileDepth : depth)) continue;
    for (int64_t tap = 0; tap < taps; ++tap) {
      locate_rows<kGradient>(tile, call, first_row, tap);
      __syncthreads();
      stage<kMath, kGradient>(tile, call, x, weight, mask, first_column, first, tap);
      __syncthreads();
      multiply<kMath>(tile, sums, row, column);
      __syncthreads();
    }
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
            // Rounded before the mask comes on, so that y is channel_scale of z.
            const scalar_t unmasked = static_cast<scalar_t>(value);
            if (z) z[place + c * call.result.channel] = unmasked;
            y[place + c * call.result.channel] = static_cast<scalar_t>(static_cast<float>(unmasked) * mask[c]);
          }
        }
      }
    }
  }
}

// What both ops are told, checked.
struct ConvSetting {
  int64_t maps, groups, channels, out_channels;  // channels of the input and of the output, all groups
  core::ConvShape shape;
};

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

ConvSetting setting_of(const Tensor& weight, const Tensor& mask, int64_t height, int64_t width,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation, int64_t groups) {
  BDP_CHECK(weight.dim() == 5, "weight must be [G, O, I, kh, kw], got ", weight.dim(), " dimensions");
  BDP_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
            "stride, padding and dilation must have two numbers each");
  BDP_CHECK(groups > 0 && weight.size(1) % groups == 0, "groups must divide ", weight.size(1), ", got ", groups);
  for (int axis = 0; axis < 2; ++axis) {
    BDP_CHECK(stride[axis] > 0 && dilation[axis] > 0 && padding[axis] >= 0,
              "stride and dilation must be positive, and padding not negative");
  }
  BDP_CHECK(mask.scalar_type() == ScalarType::Float && mask.is_contiguous() && mask.dim() == 2 &&
                mask.size(0) == weight.size(0) && mask.size(1) == weight.size(1),
            "mask must be contiguous float32 [G, O]");
  const int64_t kernel_height = weight.size(3), kernel_width = weight.size(4);
  const core::ConvShape shape{height,
                              width,
                              out_size(height, kernel_height, stride[0], padding[0], dilation[0]),
                              out_size(width, kernel_width, stride[1], padding[1], dilation[1]),
                              kernel_height,
                              kernel_width,
                              stride[0],
                              stride[1],
                              padding[0],
                              padding[1],
                              dilation[0],
                              dilation[1]};
  BDP_CHECK(shape.out_height > 0 && shape.out_width > 0, "the kernel is larger than the padded input");
  return {weight.size(0), groups, weight.size(2) * groups, weight.size(1), shape};
}

MapStrides strides_of(const Stack& stack) {
  const int64_t c = stack.map.channels, p = stack.map.positions, n = stack.samples();
  if (stack.map.channels_fastest) return {n * c * p, c * p, 1, c};
  return {n * c * p, c * p, p, 1};
}

// An empty stack [maps * samples, channels, height, width] in the given layout.
Tensor new_maps(const Tensor& like, int64_t count, int64_t channels, int64_t height, int64_t width, bool fastest) {
  if (!fastest) return torch::stable::new_empty(like, {count, channels, height, width});
  const Tensor flat = torch::stable::new_empty(like, {count, height, width, channels});
  return torch::stable::transpose(torch::stable::transpose(flat, 2, 3), 1, 2);
}

template <bool kGradient>
void run(const ConvCall& call, const ConvSetting& setting, bool exact, const Tensor& x, const Tensor& weight,
         const Tensor& mask, const Tensor* bias, Tensor& y, Tensor* z) {
  const int64_t blocks = setting.maps * setting.groups * call.column_tiles * call.row_tiles;
  BDP_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "too many tiles for one launch: ", blocks);
  const auto go = [&](auto math, auto type) {
    using scalar_t = typename decltype(type)::type;
    launch(conv_kernel<decltype(math)::value, kGradient, scalar_t>, dim3(blocks), dim3(kThreads), current_stream(x),
           static_cast<const scalar_t*>(x.data_ptr()), static_cast<const scalar_t*>(weight.data_ptr()),
           static_cast<const float*>(mask.data_ptr()), bias ? static_cast<const float*>(bias->data_ptr()) : nullptr,
           static_cast<scalar_t*>(y.data_ptr()), z ? static_cast<scalar_t*>(z->data_ptr()) : nullptr, call);
  };
  using Exact = std::integral_constant<Math, Math::kExact>;
  using OnTensorCores = std::integral_constant<Math, Math::kTensor>;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return exact ? go(Exact{}, Type<float>{}) : go(OnTensorCores{}, Type<float>{});
    case ScalarType::Half:
      return go(OnTensorCores{}, Type<torch::headeronly::Half>{});
    default:
      BDP_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be float16, bfloat16 or float32");
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
            "x does not fit a weight of ", setting.maps, " models with ", setting.channels, " input channels");
  if (bias) {
    check_same_device(*bias, x, "bias");
    BDP_CHECK(bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->numel() == mask.numel(),
              "bias must be contiguous float32 [G, O]");
  }
  const DeviceGuard guard(x.get_device_index());
  const Stack source = as_stack(x, stacked);
  const core::ConvShape& shape = setting.shape;
  const int64_t samples = source.samples(), positions = shape.out_height * shape.out_width;
  const bool fastest = source.map.channels_fastest;
  const auto maps = [&](int64_t count) {
    return new_maps(x, count * samples, setting.out_channels, shape.out_height, shape.out_width, fastest);
  };
  Tensor y = maps(setting.maps);
  Tensor z = need_z ? maps(setting.maps) : empty_on_device(0, x.scalar_type(), x);
  const std::vector<int64_t> sizes{setting.maps, samples, setting.out_channels, shape.out_height, shape.out_width};
  if (y.numel() > 0) {
    const Tensor filters = torch::stable::contiguous(weight);
    ConvCall call{};
    call.shape = shape;
    call.source = strides_of(source);
    if (!stacked) call.source.map = 0;
    const FeatureMap result{y, setting.maps * samples, setting.out_channels, positions, fastest};
    call.result = strides_of({result, setting.maps});
    call.rows = samples * positions;
    call.columns = setting.out_channels / groups;
    call.depth = setting.channels / groups;
    call.row_positions = positions;
    call.row_tiles = ceil_div(call.rows, kTileRows);
    call.column_tiles = ceil_div(call.columns, kTileColumns);
    call.groups = groups;
    call.weight_depth = shape.taps();
    call.weight_column = call.depth * shape.taps();
    call.weight_group = call.columns * call.weight_column;
    call.weight_map = setting.out_channels * call.weight_column;
    call.channels_fastest = fastest;
    run<false>(call, setting, exact, source.map.tensor, filters, mask, bias ? &*bias : nullptr, y,
               need_z ? &z : nullptr);
  }
  return {torch::stable::reshape(y, sizes), need_z ? torch::stable::reshape(z, sizes) : z};
}

Tensor stacked_conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& mask, int64_t height,
                                 int64_t width, std::vector<int64_t> stride, std::vector<int64_t> padding,
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
  const DeviceGuard guard(grad.get_device_index());
  const Stack source = as_stack(grad, true);
  const int64_t samples = source.samples(), positions = height * width;
  const bool fastest = source.map.channels_fastest;
  Tensor result = new_maps(grad, setting.maps * samples, setting.channels, height, width, fastest);
  if (result.numel() > 0) {
    const Tensor filters = torch::stable::contiguous(weight);
    ConvCall call{};
    call.shape = shape;
    call.source = strides_of(source);
    const FeatureMap map{result, setting.maps * samples, setting.channels, positions, fastest};
    call.result = strides_of({map, setting.maps});
    call.rows = samples * positions;
    call.columns = setting.channels / groups;
    call.depth = setting.out_channels / groups;
    call.row_positions = positions;
    call.row_tiles = ceil_div(call.rows, kTileRows);
    call.column_tiles = ceil_div(call.columns, kTileColumns);
    call.groups = groups;
    call.weight_depth = call.columns * shape.taps();
    call.weight_column = shape.taps();
    call.weight_group = call.depth * call.weight_depth;
    call.weight_map = setting.out_channels * call.weight_depth;
    call.channels_fastest = fastest;
    run<true>(call, setting, exact, source.map.tensor, filters, mask, nullptr, result, nullptr);
  }
  return torch::stable::reshape(result, {setting.maps, samples, setting.channels, height, width});
}

}  // namespace
}  // namespace bdprune::cuda

STABLE_TORCH_LIBRARY_IMPL(bdprune, CUDA, m)
{
  m.impl("stacked_conv2d", TORCH_BOX(&bdprune::cuda::stacked_conv2d));
  m.impl("stacked_conv2d_input_grad", TORCH_BOX(&bdprune::cuda::stacked_conv2d_input_grad));
}
