// Shared by stamp on the CPU and on CUDA: checks, and the layout of stamped images.
#pragma once

#include "common.h"

namespace bdprune {

// The type to compute in.
inline ScalarType computing(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor converted(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

inline void check_stamp(const Tensor& images, const OptionalTensor& masks, const Tensor& patterns) {
  BDP_CHECK(images.dim() == 4 && patterns.dim() == 4, "images and patterns must have 4 dimensions, got ", images.dim(),
            " and ", patterns.dim());
  BDP_CHECK(is_floating(images.scalar_type()) && is_floating(patterns.scalar_type()),
            "images and patterns must have floating dtypes");
  for (int64_t d = 1; d < 4; ++d) {
    BDP_CHECK(patterns.size(d) == images.size(d), "patterns must have the size of an image, ", images.size(d),
              " in dimension ", d, ", got ", patterns.size(d));
  }
  if (!masks) return;
  BDP_CHECK(is_floating(masks->scalar_type()), "masks must have a floating dtype");
  BDP_CHECK(masks->dim() == 4 && masks->size(0) == patterns.size(0) && masks->size(1) == 1 &&
                masks->size(2) == images.size(2) && masks->size(3) == images.size(3),
            "masks must be [H, 1, h, w], with one mask for each of ", patterns.size(0), " patterns");
}

inline void check_picks(const Tensor& picks, int64_t triggers) {
  BDP_CHECK(picks.dim() == 2 && picks.size(0) == triggers && picks.scalar_type() == ScalarType::Long,
            "picks must be int64 [", triggers, ", N]");
}

// Memory for `count` stamped images, in the layout of dense images [M, C, h, w].
inline Tensor stamped_like(const Tensor& images, int64_t count) {
  return new_maps(images, count, images.size(1), images.size(2), images.size(3), !images.is_contiguous());
}

// Stamped images [H * N, C, h, w] as [H, N, C, h, w].
inline Tensor as_triggers(const Tensor& stamped, int64_t triggers, int64_t count) {
  return torch::stable::view(stamped, {triggers, count, stamped.size(1), stamped.size(2), stamped.size(3)});
}

// The gradient of the stamped images [H, N, C, h, w] as a map [H * N, C, h, w] in the layout of the images.
inline Tensor dense_gradient(const Tensor& grad, const FeatureMap& images, int64_t triggers, int64_t count) {
  BDP_CHECK(grad.dim() == 5 && grad.size(0) == triggers && grad.size(1) == count &&
                grad.numel() == triggers * count * images.channels * images.positions,
            "grad must have the shape of the stamped images");
  BDP_CHECK(grad.scalar_type() == images.tensor.scalar_type(), "grad must have the dtype of the images");
  const FeatureMap map = as_stack(grad, true).map;
  if (map.channels_fastest == images.channels_fastest || map.positions == 1 || map.channels == 1) return map.tensor;
  Tensor copy = stamped_like(images.tensor, triggers * count);
  return torch::stable::copy_(copy, map.tensor);
}

}  // namespace bdprune
