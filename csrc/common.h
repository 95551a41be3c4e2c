// Shared by all kernel files: the tensor type, checks, layouts and dtype dispatch. Code uses these names instead of
// torch::stable, so that a change to another ABI would be mechanical.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "core/macros.h"

namespace bdprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

template <typename T>
struct Type {
  using type = T;
};

// Calls fn(Type<T>{}) with the C++ type of a floating dtype (torch::headeronly::Half and BFloat16 for the 16-bit
// dtypes). The caller must have checked the dtype.
#pragma nv_exec_check_disable  // fn runs on the same side as its caller
template <typename Fn>
BDP_HD BDP_INLINE decltype(auto) with_type(ScalarType dtype, Fn&& fn) {
  switch (dtype) {
    case ScalarType::Float:
      return fn(Type<float>{});
    case ScalarType::Double:
      return fn(Type<double>{});
    case ScalarType::Half:
      return fn(Type<torch::headeronly::Half>{});
    default:
      return fn(Type<torch::headeronly::BFloat16>{});
  }
}

// The same for any dtype: throws unless the dtype is floating.
template <typename Fn>
decltype(auto) dispatch_floating(ScalarType dtype, Fn&& fn) {
  BDP_CHECK(is_floating(dtype), "dtype must be float16, bfloat16, float32 or float64, got code ",
            static_cast<int>(dtype));
  return with_type(dtype, fn);
}

// Element i of an array of a checked floating dtype.
BDP_HD BDP_INLINE double read_scalar(const void* data, ScalarType dtype, int64_t i) {
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T value = static_cast<const T*>(data)[i];
    if constexpr (sizeof(T) == 2) {
      return static_cast<double>(static_cast<float>(value));
    } else {
      return static_cast<double>(value);
    }
  });
}

// A feature map x [N, C, *] as seen by the kernels: `positions` = product of the trailing sizes, and whether the
// channels (channels_last, or no trailing axes) or the positions are the fastest axis.
struct FeatureMap {
  Tensor tensor;  // dense in the layout named by `channels_fastest`
  int64_t samples, channels, positions;
  bool channels_fastest;

  int64_t numel() const { return samples * channels * positions; }
};

// True when the memory order of x is N, *, C without gaps.
inline bool is_channels_fastest(const Tensor& x) {
  const int64_t dims = x.dim();
  int64_t expected = x.size(1);
  if (x.size(1) > 1 && x.stride(1) != 1) return false;
  for (int64_t d = dims - 1; d >= 2; --d) {
    if (x.size(d) > 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return x.size(0) <= 1 || x.stride(0) == expected;
}

// The feature map of x, copied to NCHW only if x is dense in neither layout.
inline FeatureMap as_feature_map(const Tensor& x) {
  BDP_CHECK(x.dim() >= 2, "expected [N, C] or [N, C, *], got ", x.dim(), " dimensions");
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
  const bool contiguous = x.is_contiguous();
  if (!contiguous && is_channels_fastest(x)) return {x, x.size(0), x.size(1), positions, true};
  return {contiguous ? x : torch::stable::contiguous(x), x.size(0), x.size(1), positions, positions == 1};
}

// One map, or a stack of `size` maps that is processed as one map with the samples of all. Map g has the samples
// [g, g + 1) * samples().
struct Stack {
  FeatureMap map;
  int64_t size;

  int64_t samples() const { return size > 0 ? map.samples / size : 0; }
};

// x [N, C, *] unchanged, or a stack x [G, N, C, *] as [G * N, C, *]; copied only if that is not a view of x, or dense
// in neither layout.
inline Stack as_stack(const Tensor& x, bool stacked) {
  if (!stacked) return {as_feature_map(x), 1};
  BDP_CHECK(x.dim() >= 3, "expected a stack [G, N, C] or [G, N, C, *], got ", x.dim(), " dimensions");
  const std::vector<int64_t> sizes = x.sizes().vec();
  std::vector<int64_t> flat(sizes.begin() + 1, sizes.end());
  flat[0] *= sizes[0];
  return {as_feature_map(torch::stable::reshape(x, flat)), sizes[0]};
}

// grad in the memory order of `map`; maps with one channel or position have only one order.
inline Tensor in_layout_of(const FeatureMap& map, const FeatureMap& grad) {
  const bool single = grad.positions == 1 || grad.channels == 1;
  if (grad.channels_fastest == map.channels_fastest || single) return grad.tensor;
  Tensor copy = torch::stable::empty_like(map.tensor);
  return torch::stable::copy_(copy, grad.tensor);
}

// An empty map [count, channels, height, width] on the device of `like`, in its dtype, NCHW or channels_last.
inline Tensor new_maps(const Tensor& like, int64_t count, int64_t channels, int64_t height, int64_t width,
                       bool fastest) {
  if (!fastest) return torch::stable::new_empty(like, {count, channels, height, width});
  const Tensor flat = torch::stable::new_empty(like, {count, height, width, channels});
  return torch::stable::transpose(torch::stable::transpose(flat, 2, 3), 1, 2);
}

// `flat` [G * N, C, *] in the shape of x.
inline Tensor in_shape_of(const Tensor& x, const Tensor& flat) {
  return flat.dim() == x.dim() ? flat : torch::stable::reshape(flat, x.sizes());
}

}  // namespace bdprune
