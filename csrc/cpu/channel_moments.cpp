// channel_moments_update_ on the CPU: chunks of positions in order; within a chunk the packing is shared out by
// channels and the products by tiles.
#include <algorithm>

#include "../core/moments.h"
#include "kernels.h"

namespace bdprune {
namespace {

double* double_data(const Tensor& t, int64_t numel, const char* name) {
  BDP_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.numel() == numel, name,
            " must be contiguous float64 with ", numel, " elements, got ", t.numel());
  return static_cast<double*>(t.mutable_data_ptr());
}

void update_one(const Tensor& cross, const Tensor& sum, const Tensor& norm_sum, const Tensor& x, const Tensor& shift) {
  const FeatureMap map = as_feature_map(x);
  const int64_t channels = map.channels, total = map.samples * map.positions;
  double* out = double_data(cross, channels * channels, "cross");
  const double* shift_data = double_data(shift, channels, "shift");
  double *sum_data = double_data(sum, channels, "sum"), *norm_data = double_data(norm_sum, channels, "norm_sum");
  if (total == 0 || channels == 0) return;

  const core::FeatureView view{
      map.tensor.const_data_ptr(), core_dtype(x.scalar_type()), map.samples, channels, map.positions,
      map.channels_fastest};
  const AlignedBuffer buffer(core::moment_buffer_bytes(view));
  std::fill_n(static_cast<char*>(buffer.get()), core::moment_buffer_bytes(view), 0);
  std::vector<double> squares(static_cast<size_t>(channels), 0.0);
  const core::MomentState state{sum_data, norm_data, squares.data()};
  // Shares of at least some 30k elements to pack and 500k multiply-adds, below which a thread costs more than it saves.
  const int64_t grain_octets = 16, grain_pairs = 2;
  for (int64_t start = 0; start < total; start += core::kChunk) {
    const int64_t count = std::min(core::kChunk, total - start);
    torch::stable::parallel_for(0, view.octets(), grain_octets, [&](int64_t begin, int64_t end) {
      core::pack_moments(view, shift_data, start, count, begin, end, buffer.get(), state);
    });
    torch::stable::parallel_for(0, core::moment_pairs(view), grain_pairs, [&](int64_t begin, int64_t end) {
      core::cross_moments(view, count, begin, end, buffer.get(), out);
    });
  }
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t j = 0; j < i; ++j) out[i * channels + j] = out[j * channels + i];
  }
}

void channel_moments_update_cpu(Tensor cross, Tensor sum, Tensor norm_sum, Tensor x, Tensor shift, bool) {
  if (cross.dim() < 3) return update_one(cross, sum, norm_sum, x, shift);
  for (int64_t g = 0; g < x.size(0); ++g) {
    const auto part = [g](const Tensor& t) { return torch::stable::select(t, 0, g); };
    update_one(part(cross), part(sum), part(norm_sum), part(x), part(shift));
  }
}

}  // namespace
}  // namespace bdprune

STABLE_TORCH_LIBRARY_IMPL(bdprune, CPU, m)
{
  m.impl("channel_moments_update_", TORCH_BOX(&bdprune::channel_moments_update_cpu));
}
