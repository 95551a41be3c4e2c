// stamp and its backward on the CPU. One pass reads the picked images in place. A tile of one trigger is the unit of
// work, so one thread computes each sum, in a fixed order.
#include "../core/stamp.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../stamp.h"
#include "kernels.h"

namespace bdprune {
namespace {

constexpr int64_t kTileElements = 3 << 10;  // an image of CIFAR-10
constexpr int64_t kFewestPositions = 64;    // of a tile, because short rows are slow
constexpr int64_t kGrainElements = 1 << 15;

core::ImageStrides strides_of(const FeatureMap& map) {
  return map.channels_fastest ? core::ImageStrides{1, map.channels} : core::ImageStrides{map.positions, 1};
}

// The arguments of both directions, dense and in the type to compute in.
struct Arguments {
  FeatureMap images, patterns;
  OptionalTensor masks, picks;
  int64_t triggers, count;  // count: images of each trigger

  core::Stamps stamps() const {
    return {core_dtype(images.tensor.scalar_type()),
            images.channels,
            images.positions,
            strides_of(images),
            strides_of(patterns),
            images.tensor.const_data_ptr(),
            picks ? static_cast<const int64_t*>(picks->const_data_ptr()) : nullptr,
            count,
            masks ? masks->const_data_ptr() : nullptr,
            patterns.tensor.const_data_ptr()};
  }
};

Tensor checked_picks(const Tensor& picks, int64_t triggers, int64_t images) {
  check_picks(picks, triggers);
  const Tensor dense = torch::stable::contiguous(picks);
  const int64_t* values = static_cast<const int64_t*>(dense.const_data_ptr());
  const int64_t* wrong = std::find_if(values, values + dense.numel(), [&](int64_t i) { return i < 0 || i >= images; });
  if (wrong != values + dense.numel()) {
    throw std::out_of_range("picks must be in [0, " + std::to_string(images) + "), got " + std::to_string(*wrong));
  }
  return dense;
}

Arguments arguments_of(const Tensor& images, const OptionalTensor& masks, const Tensor& patterns,
                       const OptionalTensor& picks) {
  check_stamp(images, masks, patterns);
  const ScalarType wide = computing(images.scalar_type());
  Arguments arguments{as_feature_map(images), as_feature_map(converted(patterns, wide)), {}, {}, patterns.size(0), 0};
  if (masks) arguments.masks = torch::stable::contiguous(converted(*masks, wide));
  if (picks) arguments.picks = checked_picks(*picks, patterns.size(0), images.size(0));
  arguments.count = picks ? picks->size(1) : images.size(0);
  return arguments;
}

// Calls fn(tile, scratch) for all tiles. The triggers of one part of the images follow each other, so that a cache
// holds this part.
template <typename Fn>
void for_each_tile(const Arguments& arguments, Fn&& fn) {
  const int64_t channels = std::max<int64_t>(arguments.images.channels, 1), positions = arguments.images.positions;
  const int64_t width = std::min(positions, std::max(ceil_div(kTileElements, channels), kFewestPositions));
  if (width == 0) return;
  const int64_t work = width * channels * std::max<int64_t>(arguments.count, 1), triggers = arguments.triggers;
  const int64_t tiles = ceil_div(positions, width) * triggers;
  torch::stable::parallel_for(0, tiles, ceil_div(kGrainElements, work), [&](int64_t first, int64_t last) {
    const AlignedBuffer scratch(core::stamp_scratch_bytes(width * channels));
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i / triggers * width;
      fn(core::StampTile{i % triggers, begin, std::min(positions, begin + width)}, scratch.get());
    }
  });
}

Tensor stamp_cpu(Tensor images, OptionalTensor masks, Tensor patterns, OptionalTensor picks) {
  const Arguments arguments = arguments_of(images, masks, patterns, picks);
  const Tensor out = stamped_like(arguments.images.tensor, arguments.triggers * arguments.count);
  if (out.numel() > 0) {
    const core::Stamps stamps = arguments.stamps();
    void* to = out.mutable_data_ptr();
    advise_huge_pages(to, out.numel() * static_cast<int64_t>(out.element_size()));
    for_each_tile(arguments,
                  [&](const core::StampTile& tile, void* scratch) { core::stamp(stamps, tile, to, scratch); });
  }
  return as_triggers(out, arguments.triggers, arguments.count);
}

std::tuple<Tensor, Tensor> stamp_backward_cpu(Tensor grad, Tensor images, OptionalTensor masks, Tensor patterns,
                                              OptionalTensor picks, bool need_masks, bool need_patterns) {
  const Arguments arguments = arguments_of(images, masks, patterns, picks);
  const Tensor dense = dense_gradient(grad, arguments.images, arguments.triggers, arguments.count);
  need_masks = need_masks && masks;
  const ScalarType wide = computing(images.scalar_type());
  const Tensor grad_masks = need_masks ? torch::stable::empty_like(*arguments.masks) : torch::stable::empty({0}, wide);
  const Tensor grad_patterns =
      need_patterns ? torch::stable::empty_like(arguments.patterns.tensor) : torch::stable::empty({0}, wide);
  if (need_masks || need_patterns) {
    const core::Stamps stamps = arguments.stamps();
    const void* from = dense.const_data_ptr();
    void* to_masks = need_masks ? grad_masks.mutable_data_ptr() : nullptr;
    void* to_patterns = need_patterns ? grad_patterns.mutable_data_ptr() : nullptr;
    for_each_tile(arguments, [&](const core::StampTile& tile, void* scratch) {
      core::stamp_backward(stamps, tile, from, to_masks, to_patterns, scratch);
    });
  }
  const ScalarType of_masks = masks ? masks->scalar_type() : wide;
  return {converted(grad_masks, of_masks), converted(grad_patterns, patterns.scalar_type())};
}

}  // namespace
}  // namespace bdprune

STABLE_TORCH_LIBRARY_IMPL(bdprune, CPU, m)
{
  m.impl("stamp", TORCH_BOX(&bdprune::stamp_cpu));
  m.impl("stamp_backward", TORCH_BOX(&bdprune::stamp_backward_cpu));
}
