// channel_scale and its backward on the CPU. One pass over the maps. The gradient of a channel is first summed per row
// (or per fixed slab of rows) in float64 and then over those in order, so the bits don't depend on the threads.
#include "../core/channel_scale.h"

#include <algorithm>

#include "kernels.h"

namespace bdprune {
namespace {

constexpr int64_t kGrainElements = 1 << 15;
// With the channels fastest, each slab of this many rows has its own partial sums.
constexpr int64_t kSlabRows = 512;

// z as a map for a mask [C], or as a stack of maps for a mask [G, C].
Stack stack_of(const Tensor& z, const Tensor& mask) {
  BDP_CHECK(mask.dim() == 1 || mask.dim() == 2, "mask must be [C] or [G, C], got ", mask.dim(), " dimensions");
  const Stack stack = as_stack(z, mask.dim() == 2);
  BDP_CHECK(mask.size(mask.dim() - 1) == stack.map.channels && mask.numel() == stack.size * stack.map.channels,
            "mask must have one entry for each of ", stack.size, " x ", stack.map.channels, " channels, got ",
            mask.numel());
  return stack;
}

std::vector<double> read_mask(const Tensor& mask) {
  const Tensor dense = torch::stable::contiguous(mask);
  BDP_CHECK(is_floating(mask.scalar_type()), "mask must have a floating dtype");
  std::vector<double> values(static_cast<size_t>(mask.numel()));
  for (size_t i = 0; i < values.size(); ++i) values[i] = read_scalar(dense.const_data_ptr(), mask.scalar_type(), i);
  return values;
}

// Calls fn(g, begin, end) for the parts of the rows [begin, end) that lie in one map g of a stack.
template <typename Fn>
void for_each_map(int64_t begin, int64_t end, int64_t rows_per_map, Fn&& fn) {
  while (begin < end) {
    const int64_t g = begin / rows_per_map, stop = std::min(end, (g + 1) * rows_per_map);
    fn(g, begin, stop);
    begin = stop;
  }
}

// A tensor with the dtype, sizes and layout of the map.
Tensor empty_like_map(const FeatureMap& map) { return torch::stable::empty_like(map.tensor); }

Tensor channel_scale_cpu(Tensor z, Tensor mask) {
  const Stack stack = stack_of(z, mask);
  const FeatureMap& map = stack.map;
  const std::vector<double> values = read_mask(mask);
  const Tensor out = empty_like_map(map);
  if (map.numel() == 0) return in_shape_of(z, out);
  const core::Dtype dtype = core_dtype(z.scalar_type());
  const void* from = map.tensor.const_data_ptr();
  void* to = out.mutable_data_ptr();
  if (map.channels_fastest) {
    const int64_t grain = ceil_div(kGrainElements, map.channels);
    torch::stable::parallel_for(0, map.samples * map.positions, grain, [&](int64_t first, int64_t last) {
      for_each_map(first, last, stack.samples() * map.positions, [&](int64_t g, int64_t begin, int64_t end) {
        core::scale_columns(dtype, from, values.data() + g * map.channels, map.channels, begin, end, to);
      });
    });
  } else {
    const int64_t grain = ceil_div(kGrainElements, map.positions);
    torch::stable::parallel_for(0, map.samples * map.channels, grain, [&](int64_t first, int64_t last) {
      for_each_map(first, last, stack.samples() * map.channels, [&](int64_t g, int64_t begin, int64_t end) {
        core::scale_rows(dtype, from, values.data() + g * map.channels, map.channels, map.positions, begin, end, to);
      });
    });
  }
  return in_shape_of(z, out);
}

// out[c] = sum of the groups' partial[group, c], in order.
template <typename T>
void write_sums(const double* partial, int64_t groups, int64_t channels, T* out) {
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int64_t group = 0; group < groups; ++group) sum += partial[group * channels + c];
    out[c] = static_cast<T>(sum);
  }
}

// partial [G, groups, C] summed over the groups of each map, in the shape and dtype of the mask.
Tensor sums_to_tensor(const std::vector<double>& partial, int64_t groups, const Tensor& mask) {
  const Tensor out = torch::stable::empty(mask.sizes(), mask.scalar_type());
  const int64_t channels = mask.size(mask.dim() - 1), maps = mask.dim() == 2 ? mask.size(0) : 1;
  dispatch_floating(mask.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t g = 0; g < maps; ++g) {
      write_sums(partial.data() + g * groups * channels, groups, channels, to + g * channels);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> channel_scale_backward_cpu(Tensor grad, Tensor z, Tensor mask, bool need_z, bool need_mask) {
  const Stack stack = stack_of(z, mask);
  const FeatureMap& map = stack.map;
  const std::vector<double> values = read_mask(mask);
  BDP_CHECK(grad.numel() == map.numel() && grad.scalar_type() == z.scalar_type(),
            "grad must have the shape and dtype of z, got ", grad.numel(), " elements for ", map.numel());
  const Tensor dz = need_z ? empty_like_map(map) : torch::stable::empty({0}, z.scalar_type());
  const int64_t rows = stack.samples() * (map.channels_fastest ? map.positions : map.channels);  // of one map
  const int64_t slabs = ceil_div(rows, kSlabRows), groups = map.channels_fastest ? slabs : stack.samples();
  std::vector<double> partial(need_mask ? static_cast<size_t>(stack.size * groups * map.channels) : 0, 0.0);

  if (map.numel() > 0 && (need_z || need_mask)) {
    const Tensor dense = in_layout_of(map, as_stack(grad, mask.dim() == 2).map);
    const core::Dtype dtype = core_dtype(z.scalar_type());
    const void *g = dense.const_data_ptr(), *from = map.tensor.const_data_ptr();
    void* to = need_z ? dz.mutable_data_ptr() : nullptr;
    double* dots = need_mask ? partial.data() : nullptr;
    if (map.channels_fastest) {
      const int64_t grain = ceil_div(kGrainElements, map.channels * kSlabRows);
      torch::stable::parallel_for(0, stack.size * slabs, grain, [&](int64_t first, int64_t last) {
        for (int64_t slab = first; slab < last; ++slab) {
          const int64_t map_index = slab / slabs, begin = slab % slabs * kSlabRows, base = map_index * rows;
          core::scale_columns_backward(dtype, g, from, values.data() + map_index * map.channels, map.channels,
                                       base + begin, base + std::min(rows, begin + kSlabRows), to,
                                       dots ? dots + slab * map.channels : nullptr);
        }
      });
    } else {
      const int64_t grain = ceil_div(kGrainElements, map.positions);
      torch::stable::parallel_for(0, stack.size * rows, grain, [&](int64_t first, int64_t last) {
        for_each_map(first, last, rows, [&](int64_t map_index, int64_t begin, int64_t end) {
          core::scale_rows_backward(dtype, g, from, values.data() + map_index * map.channels, map.channels,
                                    map.positions, begin, end, to, dots);
        });
      });
    }
  }
  const Tensor shaped = need_z ? in_shape_of(z, dz) : dz;
  if (!need_mask) return {shaped, torch::stable::empty({0}, mask.scalar_type())};
  return {shaped, sums_to_tensor(partial, groups, mask)};
}

}  // namespace
}  // namespace bdprune

STABLE_TORCH_LIBRARY_IMPL(bdprune, CPU, m)
{
  m.impl("channel_scale", TORCH_BOX(&bdprune::channel_scale_cpu));
  m.impl("channel_scale_backward", TORCH_BOX(&bdprune::channel_scale_backward_cpu));
}
