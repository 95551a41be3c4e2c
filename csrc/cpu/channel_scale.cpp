// channel_scale and its backward on the CPU. One pass over the maps; what a channel's gradient sums up is first summed
// per row (or per fixed slab of rows) in float64 and then over those in order, so the bits don't depend on the threads.
#include <algorithm>

#include "../core/scale.h"
#include "kernels.h"

namespace bdprune {
namespace {

constexpr int64_t kGrainElements = 1 << 15;
// With the channels fastest, each slab of this many rows has its own partial sums.
constexpr int64_t kSlabRows = 512;

std::vector<double> read_mask(const Tensor& mask, int64_t channels) {
  BDP_CHECK(mask.dim() == 1 && mask.size(0) == channels, "mask must be [", channels, "], got ", mask.numel(),
            " elements in ", mask.dim(), " dimensions");
  const Tensor dense = torch::stable::contiguous(mask);
  const core::Dtype dtype = core_dtype(mask.scalar_type());
  std::vector<double> values(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) values[static_cast<size_t>(c)] = read_scalar(dense.const_data_ptr(), dtype, c);
  return values;
}

// A tensor with the dtype, sizes and layout of the map.
Tensor empty_like_map(const FeatureMap& map) { return torch::stable::empty_like(map.tensor); }

Tensor channel_scale_cpu(Tensor z, Tensor mask) {
  const FeatureMap map = as_feature_map(z);
  const std::vector<double> values = read_mask(mask, map.channels);
  const Tensor out = empty_like_map(map);
  if (map.numel() == 0) return out;
  const core::Dtype dtype = core_dtype(z.scalar_type());
  const void* from = map.tensor.const_data_ptr();
  void* to = out.mutable_data_ptr();
  if (map.channels_fastest) {
    const int64_t grain = ceil_div(kGrainElements, map.channels);
    torch::stable::parallel_for(0, map.samples * map.positions, grain, [&](int64_t begin, int64_t end) {
      core::scale_columns(dtype, from, values.data(), map.channels, begin, end, to);
    });
  } else {
    const int64_t grain = ceil_div(kGrainElements, map.positions);
    torch::stable::parallel_for(0, map.samples * map.channels, grain, [&](int64_t begin, int64_t end) {
      core::scale_rows(dtype, from, values.data(), map.channels, map.positions, begin, end, to);
    });
  }
  return out;
}

// grad in the layout of z.
Tensor match_layout(const Tensor& grad, const FeatureMap& z) {
  const FeatureMap map = as_feature_map(grad);
  const bool single = map.positions == 1 || map.channels == 1;
  if (map.channels_fastest == z.channels_fastest || single) return map.tensor;
  Tensor copy = torch::stable::empty_like(z.tensor);
  return torch::stable::copy_(copy, grad);
}

template <typename T>
void write_sums(const std::vector<double>& partial, int64_t groups, int64_t channels, T* out) {
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int64_t g = 0; g < groups; ++g) sum += partial[static_cast<size_t>(g * channels + c)];
    out[c] = static_cast<T>(sum);
  }
}

Tensor sums_to_tensor(const std::vector<double>& partial, int64_t groups, int64_t channels, ScalarType dtype) {
  const Tensor out = torch::stable::empty({channels}, dtype);
  dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    write_sums(partial, groups, channels, static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor> channel_scale_backward_cpu(Tensor grad, Tensor z, Tensor mask, bool need_z, bool need_mask) {
  const FeatureMap map = as_feature_map(z);
  const std::vector<double> values = read_mask(mask, map.channels);
  BDP_CHECK(grad.numel() == map.numel() && grad.scalar_type() == z.scalar_type(),
            "grad must have the shape and dtype of z, got ", grad.numel(), " elements for ", map.numel());
  const Tensor dz = need_z ? empty_like_map(map) : torch::stable::empty({0}, z.scalar_type());
  const int64_t rows = map.samples * (map.channels_fastest ? map.positions : map.channels);
  const int64_t slabs = ceil_div(rows, kSlabRows), groups = map.channels_fastest ? slabs : map.samples;
  std::vector<double> partial(need_mask ? static_cast<size_t>(groups * map.channels) : 0, 0.0);

  if (map.numel() > 0 && (need_z || need_mask)) {
    const Tensor dense = match_layout(grad, map);
    const core::Dtype dtype = core_dtype(z.scalar_type());
    const void *g = dense.const_data_ptr(), *from = map.tensor.const_data_ptr();
    void* to = need_z ? dz.mutable_data_ptr() : nullptr;
    double* dots = need_mask ? partial.data() : nullptr;
    if (map.channels_fastest) {
      const int64_t grain = ceil_div(kGrainElements, map.channels * kSlabRows);
      torch::stable::parallel_for(0, slabs, grain, [&](int64_t begin, int64_t end) {
        for (int64_t slab = begin; slab < end; ++slab) {
          core::scale_columns_backward(dtype, g, from, values.data(), map.channels, slab * kSlabRows,
                                       std::min(rows, (slab + 1) * kSlabRows), to,
                                       dots ? dots + slab * map.channels : nullptr);
        }
      });
    } else {
      const int64_t grain = ceil_div(kGrainElements, map.positions);
      torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        core::scale_rows_backward(dtype, g, from, values.data(), map.channels, map.positions, begin, end, to, dots);
      });
    }
  }
  if (!need_mask) return {dz, torch::stable::empty({0}, mask.scalar_type())};
  return {dz, sums_to_tensor(partial, groups, map.channels, mask.scalar_type())};
}

}  // namespace
}  // namespace bdprune

STABLE_TORCH_LIBRARY_IMPL(bdprune, CPU, m)
{
  m.impl("channel_scale", TORCH_BOX(&bdprune::channel_scale_cpu));
  m.impl("channel_scale_backward", TORCH_BOX(&bdprune::channel_scale_backward_cpu));
}
