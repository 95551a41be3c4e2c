// stamp and its backward on CUDA. A thread keeps one vector of a trigger in registers while it goes through the
// trigger's images, which it reads in place. No atomics: the order of each sum depends only on the shape, so runs are
// reproducible bit for bit.
//
// An index of an image that is not there gives NaN. A check on the host would wait for the device, and a failed
// assertion on the device would end the whole process's use of it.
#include <algorithm>
#include <limits>

#include "../stamp.h"
#include "utils.cuh"

namespace bdprune::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocksWanted = 1024;  // fills any current device
constexpr int kHigh = 8;                 // threads for the images of one vector in the backward
constexpr int kWidthOfSums = 4;          // most elements of one thread in the backward: more would spill registers
constexpr int64_t kMostElements = std::numeric_limits<int32_t>::max() / 2;  // of an image, for 32-bit indices

// The order of the elements of an image, and of a pattern.
struct ImageOrder {
  uint32_t channels, positions;
  bool channels_fastest, pattern_fastest;

  BDP_HD uint32_t size() const { return channels * positions; }
  BDP_HD uint32_t position(uint32_t element) const {
    return channels_fastest ? element / channels : element % positions;
  }
  BDP_HD uint32_t channel(uint32_t element) const {
    return channels_fastest ? element % channels : element / positions;
  }
  BDP_HD uint32_t in_pattern(uint32_t element) const {
    if (channels_fastest == pattern_fastest) return element;
    const uint32_t c = channel(element), p = position(element);
    return pattern_fastest ? p * channels + c : c * positions + p;
  }
  BDP_HD uint32_t in_image(uint32_t c, uint32_t p) const {
    return channels_fastest ? p * channels + c : c * positions + p;
  }
};

// The images that the triggers are stamped on: picks [H, count], or null for all.
template <typename scalar_t>
struct Picked {
  const scalar_t* images;
  const int64_t* picks;
  int64_t num_images, count;

  // One vector of image n of a trigger, in the type to compute in.
  template <int kWidth>
  __device__ void load(int64_t trigger, int64_t n, uint32_t vectors, uint32_t vector,
                       compute_t<scalar_t> (&pixel)[kWidth]) const {
    const int64_t image = picks ? picks[trigger * count + n] : n;
    const bool exists = image >= 0 && image < num_images;
    Vector<scalar_t, kWidth> data{};
    if (exists) data = reinterpret_cast<const Vector<scalar_t, kWidth>*>(images)[image * vectors + vector];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      pixel[i] = exists ? static_cast<compute_t<scalar_t>>(data.value[i]) : static_cast<compute_t<scalar_t>>(NAN);
    }
  }
};

// Block (trigger and vectors, split) stamps its share of the trigger's images.
template <typename scalar_t, int kWidth, bool kBlend>
__global__ void __launch_bounds__(kThreads)
    stamp_kernel(Picked<scalar_t> picked, const compute_t<scalar_t>* __restrict__ masks,
                 const compute_t<scalar_t>* __restrict__ patterns, scalar_t* __restrict__ out, ImageOrder order,
                 uint32_t blocks_per_trigger, int64_t images_per_split) {
  using number_t = compute_t<scalar_t>;
  using vector_t = Vector<scalar_t, kWidth>;
  const int64_t trigger = blockIdx.x / blocks_per_trigger;
  const uint32_t vectors = order.size() / kWidth;
  const uint32_t vector = blockIdx.x % blocks_per_trigger * kThreads + threadIdx.x;
  if (vector >= vectors) return;
  number_t keep[kWidth], add[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t element = vector * kWidth + i;
    add[i] = patterns[trigger * order.size() + order.in_pattern(element)];
    if constexpr (kBlend) {
      const number_t mask = masks[trigger * order.positions + order.position(element)];
      keep[i] = 1 - mask;
      add[i] *= mask;
    }
  }
  const int64_t begin = blockIdx.y * images_per_split;
  const int64_t end = picked.count - begin < images_per_split ? picked.count : begin + images_per_split;
  for (int64_t n = begin; n < end; ++n) {
    number_t pixel[kWidth];
    picked.load(trigger, n, vectors, vector, pixel);
    vector_t result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      number_t value = kBlend ? pixel[i] * keep[i] + add[i] : pixel[i] + add[i];
      if (!kBlend && value < 0) value = 0;  // unlike fmax, keeps NaN
      if (!kBlend && value > 1) value = 1;
      result.value[i] = static_cast<scalar_t>(value);
    }
    reinterpret_cast<vector_t*>(out)[(trigger * picked.count + n) * vectors + vector] = result;
  }
}

// A block is kWarpSize vectors of one trigger wide and kHigh threads high, which share the trigger's images. Writes the
// gradient of the pattern, and to dots [H, elements in the order of the images] the sums of grad * (pattern - image).
template <typename scalar_t, int kWidth, bool kBlend>
__global__ void __launch_bounds__(kWarpSize* kHigh)
    stamp_backward_kernel(const scalar_t* __restrict__ grad, Picked<scalar_t> picked,
                          const compute_t<scalar_t>* __restrict__ masks,
                          const compute_t<scalar_t>* __restrict__ patterns,
                          compute_t<scalar_t>* __restrict__ grad_patterns, compute_t<scalar_t>* __restrict__ dots,
                          ImageOrder order, uint32_t blocks_per_trigger) {
  using number_t = compute_t<scalar_t>;
  using vector_t = Vector<scalar_t, kWidth>;
  const int64_t trigger = blockIdx.x / blocks_per_trigger;
  const uint32_t vectors = order.size() / kWidth;
  const uint32_t vector = blockIdx.x % blocks_per_trigger * kWarpSize + threadIdx.x;
  const bool inside = vector < vectors;
  const int64_t first = trigger * order.size();
  number_t colour[kWidth] = {};
  double sum[kWidth] = {}, dot[kWidth] = {};
  if (inside) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) colour[i] = patterns[first + order.in_pattern(vector * kWidth + i)];
  }
  for (int64_t n = threadIdx.y; inside && n < picked.count; n += kHigh) {
    const vector_t g = reinterpret_cast<const vector_t*>(grad)[(trigger * picked.count + n) * vectors + vector];
    number_t pixel[kWidth] = {};
    if (!kBlend || dots) picked.load(trigger, n, vectors, vector, pixel);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const number_t value = static_cast<number_t>(g.value[i]), stamped = pixel[i] + colour[i];
      if (kBlend || (stamped >= 0 && stamped <= 1)) sum[i] += static_cast<double>(value);
      if constexpr (kBlend) dot[i] += static_cast<double>(value * (colour[i] - pixel[i]));
    }
  }

  __shared__ double shared_sums[kWidth][kHigh][kWarpSize];
  __shared__ double shared_dots[kBlend ? kWidth : 1][kHigh][kWarpSize];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    shared_sums[i][threadIdx.y][threadIdx.x] = sum[i];
    if constexpr (kBlend) shared_dots[i][threadIdx.y][threadIdx.x] = dot[i];
  }
  __syncthreads();
  if (threadIdx.y != 0 || !inside) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    for (int high = 1; high < kHigh; ++high) {
      sum[i] += shared_sums[i][high][threadIdx.x];
      if constexpr (kBlend) dot[i] += shared_dots[i][high][threadIdx.x];
    }
    const uint32_t element = vector * kWidth + i;
    if constexpr (kBlend) {
      sum[i] *= static_cast<double>(masks[trigger * order.positions + order.position(element)]);
      if (dots) dots[first + element] = static_cast<number_t>(dot[i]);
    }
    if (grad_patterns) grad_patterns[first + order.in_pattern(element)] = static_cast<number_t>(sum[i]);
  }
}

// grad_masks [H, positions] = sum of dots over the channels.
template <typename number_t>
__global__ void __launch_bounds__(kThreads)
    channel_sum_kernel(const number_t* __restrict__ dots, number_t* __restrict__ grad_masks, ImageOrder order,
                       int64_t masked) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= masked) return;
  const int64_t trigger = i / order.positions;
  const uint32_t position = static_cast<uint32_t>(i - trigger * order.positions);
  double sum = 0;
  for (uint32_t c = 0; c < order.channels; ++c) {
    sum += static_cast<double>(dots[trigger * order.size() + order.in_image(c, position)]);
  }
  grad_masks[i] = static_cast<number_t>(sum);
}

bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kVectorBytes == 0; }

// The arguments of both directions, dense and in the type to compute in.
struct Arguments {
  FeatureMap images, patterns;
  OptionalTensor masks, picks;
  int64_t triggers, count;
  ImageOrder order;

  template <typename scalar_t>
  Picked<scalar_t> picked() const {
    return {static_cast<const scalar_t*>(images.tensor.data_ptr()),
            picks ? static_cast<const int64_t*>(picks->data_ptr()) : nullptr, images.samples, count};
  }
  const void* masks_data() const { return masks ? masks->data_ptr() : nullptr; }
};

Arguments arguments_of(const Tensor& images, const OptionalTensor& masks, const Tensor& patterns,
                       const OptionalTensor& picks) {
  check_stamp(images, masks, patterns);
  check_same_device(patterns, images, "patterns");
  if (masks) check_same_device(*masks, images, "masks");
  const ScalarType wide = computing(images.scalar_type());
  Arguments arguments{
      as_feature_map(images), as_feature_map(converted(patterns, wide)), {}, {}, patterns.size(0), 0, {}};
  const FeatureMap& map = arguments.images;
  BDP_CHECK(map.channels * map.positions <= kMostElements, "an image must have at most ", kMostElements,
            " elements, got ", map.channels * map.positions);
  arguments.order = {static_cast<uint32_t>(map.channels), static_cast<uint32_t>(map.positions), map.channels_fastest,
                     arguments.patterns.channels_fastest};
  if (masks) arguments.masks = torch::stable::contiguous(converted(*masks, wide));
  if (picks) {
    check_same_device(*picks, images, "picks");
    check_picks(*picks, arguments.triggers);
    arguments.picks = torch::stable::contiguous(*picks);
  }
  arguments.count = picks ? picks->size(1) : images.size(0);
  return arguments;
}

// Calls fn(C++ type of the images, vector width, whether there are masks); `other` is read or written in vectors too.
template <int kMostWidth, typename Fn>
void dispatch(const Arguments& arguments, const Tensor& other, Fn&& fn) {
  const bool aligned = is_aligned(arguments.images.tensor) && is_aligned(other);
  dispatch_floating(other.scalar_type(), [&](auto type) {
    constexpr int kWidth = std::min<int>(kMostWidth, kVectorBytes / sizeof(typename decltype(type)::type));
    const auto with_width = [&](auto width) {
      if (arguments.masks) return fn(type, width, std::true_type{});
      return fn(type, width, std::false_type{});
    };
    if (aligned && arguments.order.size() % kWidth == 0) return with_width(std::integral_constant<int, kWidth>{});
    return with_width(std::integral_constant<int, 1>{});
  });
}

Tensor stamp(const Tensor& images, const OptionalTensor& masks, const Tensor& patterns, const OptionalTensor& picks) {
  const DeviceGuard guard(images.get_device_index());
  const Arguments arguments = arguments_of(images, masks, patterns, picks);
  const int64_t triggers = arguments.triggers, count = arguments.count;
  Tensor out = stamped_like(arguments.images.tensor, triggers * count);
  if (out.numel() == 0) return as_triggers(out, triggers, count);
  dispatch<kVectorBytes>(arguments, out, [&](auto type, auto width, auto blend) {
    using scalar_t = typename decltype(type)::type;
    constexpr int kWidth = decltype(width)::value;
    const int64_t blocks = ceil_div(arguments.order.size() / kWidth, kThreads);
    const int64_t wanted = std::clamp<int64_t>(kBlocksWanted / (triggers * blocks), 1, std::min<int64_t>(count, 65535));
    const int64_t per_split = ceil_div(count, wanted);
    launch(stamp_kernel<scalar_t, kWidth, decltype(blend)::value>, dim3(triggers * blocks, ceil_div(count, per_split)),
           dim3(kThreads), current_stream(images), arguments.picked<scalar_t>(), arguments.masks_data(),
           arguments.patterns.tensor.data_ptr(), out.data_ptr(), arguments.order, blocks, per_split);
  });
  return as_triggers(out, triggers, count);
}

std::tuple<Tensor, Tensor> stamp_backward(const Tensor& grad, const Tensor& images, const OptionalTensor& masks,
                                          const Tensor& patterns, const OptionalTensor& picks, bool need_masks,
                                          bool need_patterns) {
  const DeviceGuard guard(images.get_device_index());
  check_same_device(grad, images, "grad");
  const Arguments arguments = arguments_of(images, masks, patterns, picks);
  const Tensor dense = dense_gradient(grad, arguments.images, arguments.triggers, arguments.count);
  const FeatureMap& own = arguments.patterns;
  const ScalarType wide = own.tensor.scalar_type();
  need_masks = need_masks && masks;
  const Tensor grad_masks =
      need_masks ? torch::stable::new_zeros(*arguments.masks, masks->sizes()) : empty_on_device(0, wide, images);
  const Tensor grad_patterns = need_patterns ? torch::stable::empty_like(own.tensor) : empty_on_device(0, wide, images);
  if ((need_masks || need_patterns) && own.numel() > 0) {
    const Tensor dots = empty_on_device(need_masks ? own.numel() : 0, wide, images);
    const cudaStream_t stream = current_stream(images);
    dispatch<kWidthOfSums>(arguments, dense, [&](auto type, auto width, auto blend) {
      using scalar_t = typename decltype(type)::type;
      constexpr int kWidth = decltype(width)::value;
      const int64_t blocks = ceil_div(arguments.order.size() / kWidth, kWarpSize);
      launch(stamp_backward_kernel<scalar_t, kWidth, decltype(blend)::value>, dim3(arguments.triggers * blocks),
             dim3(kWarpSize, kHigh), stream, dense.data_ptr(), arguments.picked<scalar_t>(), arguments.masks_data(),
             own.tensor.data_ptr(), need_patterns ? grad_patterns.data_ptr() : nullptr,
             need_masks ? dots.data_ptr() : nullptr, arguments.order, blocks);
      if (!need_masks) return;
      launch(channel_sum_kernel<compute_t<scalar_t>>, dim3(ceil_div(grad_masks.numel(), kThreads)), dim3(kThreads),
             stream, dots.data_ptr(), grad_masks.data_ptr(), arguments.order, grad_masks.numel());
    });
  }
  const ScalarType of_masks = masks ? masks->scalar_type() : wide;
  return {converted(grad_masks, of_masks), converted(grad_patterns, patterns.scalar_type())};
}

}  // namespace
}  // namespace bdprune::cuda

STABLE_TORCH_LIBRARY_IMPL(bdprune, CUDA, m)
{
  m.impl("stamp", TORCH_BOX(&bdprune::cuda::stamp));
  m.impl("stamp_backward", TORCH_BOX(&bdprune::cuda::stamp_backward));
}
