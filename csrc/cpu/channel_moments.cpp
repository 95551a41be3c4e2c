// channel_moments_update_ on the CPU: chunks of positions in order. With few channels, threads divide the samples into
// slabs; with many channels, they divide the packing of a chunk by channels and its products by tiles.
#include "../core/channel_moments.h"

#include <algorithm>

#include "kernels.h"

namespace bdprune {
namespace {

double* double_data(const Tensor& t, int64_t numel, const char* name) {
  BDP_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.numel() == numel, name,
            " must be contiguous float64 with ", numel, " elements, got ", t.numel());
  return static_cast<double*>(t.mutable_data_ptr());
}

// With few channels a chunk is too little work to divide, so whole samples are divided: each slab of samples has its
// own sums, which are added in order. The number of slabs, and so the bits, depends only on the map; all their cross
// sums take 2 MB at most.
constexpr int64_t kSlabs = 8, kSlabSums = 1 << 18;

void add_samples(const core::FeatureView& view, const double* shift, double* cross, double* sum, double* norm_sum) {
  const AlignedBuffer buffer(core::moment_buffer_bytes(view));
  std::fill_n(static_cast<char*>(buffer.get()), core::moment_buffer_bytes(view), 0);
  std::vector<double> squares(static_cast<size_t>(view.channels), 0.0);
  const core::MomentState state{sum, norm_sum, squares.data()};
  // Shares of at least about 30k elements to pack and 500k multiply-adds: for less, a thread costs more than it saves.
  const int64_t grain_octets = 16, grain_pairs = 2, total = view.samples * view.positions;
  for (int64_t start = 0; start < total; start += core::kChunk) {
    const int64_t count = std::min(core::kChunk, total - start);
    torch::stable::parallel_for(0, view.octets(), grain_octets, [&](int64_t begin, int64_t end) {
      core::pack_moments(view, shift, start, count, begin, end, buffer.get(), state);
    });
    torch::stable::parallel_for(0, core::moment_pairs(view), grain_pairs, [&](int64_t begin, int64_t end) {
      core::cross_moments(view, count, begin, end, buffer.get(), cross);
    });
  }
}

// The samples [begin, end) of a map.
core::FeatureView samples_of(const core::FeatureView& view, int64_t element_size, int64_t begin, int64_t end) {
  core::FeatureView part = view;
  part.data = static_cast<const char*>(view.data) + begin * view.channels * view.positions * element_size;
  part.samples = end - begin;
  return part;
}

void add_slabs(const core::FeatureView& view, int64_t element_size, int64_t slabs, const double* shift, double* cross,
               double* sum, double* norm_sum) {
  const int64_t channels = view.channels;
  const int64_t size = channels * (channels + 2);  // cross, sum, norm_sum
  std::vector<double> sums(static_cast<size_t>(slabs * size), 0.0);
  torch::stable::parallel_for(0, slabs, 1, [&](int64_t first, int64_t last) {
    for (int64_t slab = first; slab < last; ++slab) {
      double* own = sums.data() + slab * size;
      const auto part = samples_of(view, element_size, slab * view.samples / slabs, (slab + 1) * view.samples / slabs);
      add_samples(part, shift, own, own + channels * channels, own + channels * (channels + 1));
    }
  });
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const double* own = sums.data() + slab * size;
    for (int64_t i = 0; i < channels * channels; ++i) cross[i] += own[i];
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += own[channels * channels + c];
      norm_sum[c] += own[channels * (channels + 1) + c];
    }
  }
}

void update_one(const Tensor& cross, const Tensor& sum, const Tensor& norm_sum, const Tensor& x, const Tensor& shift) {
  const FeatureMap map = as_feature_map(x);
  const int64_t channels = map.channels;
  double* out = double_data(cross, channels * channels, "cross");
  const double* shift_data = double_data(shift, channels, "shift");
  double *sum_data = double_data(sum, channels, "sum"), *norm_data = double_data(norm_sum, channels, "norm_sum");
  if (map.numel() == 0) return;

  const core::FeatureView view{
      map.tensor.const_data_ptr(), core_dtype(x.scalar_type()), map.samples, channels, map.positions,
      map.channels_fastest};
  const int64_t slabs = std::min({view.samples, kSlabs, kSlabSums / (channels * channels)});
  if (slabs > 1) {
    const auto element_size = static_cast<int64_t>(map.tensor.element_size());
    add_slabs(view, element_size, slabs, shift_data, out, sum_data, norm_data);
  } else {
    add_samples(view, shift_data, out, sum_data, norm_data);
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
