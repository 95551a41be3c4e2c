// filter_spectral_norms on the CPU: divides the batches of filters of all weights among the threads.
#include "../core/filter_spectral_norms.h"

#include <algorithm>

#include "kernels.h"

namespace bdprune {
namespace {

// One weight for the core, with the position of its norms in the output and of its batches in the total work.
struct Entry {
  Tensor weight;  // keeps a copy alive, if there is one
  core::FilterBank bank;
  const void* scale = nullptr;
  ScalarType scale_dtype = ScalarType::Float;
  int64_t output = 0;
  int64_t work = 0;
};

// True if the filters of [*, O, I, kh, kw] are dense, one after the other, each in the order kh, kw, I: channels_last.
// The matrix is then transposed, which has the same singular values.
bool is_channels_last_filters(const Tensor& weight) {
  const int64_t d = weight.dim();
  if (d < 4) return false;
  const int64_t channels = weight.size(d - 3);
  int64_t expected = 1;
  for (int64_t axis : {d - 3, d - 1, d - 2}) {
    if (weight.size(axis) > 1 && weight.stride(axis) != expected) return false;
    expected *= weight.size(axis);
  }
  for (int64_t axis = d - 4; axis >= 0; --axis) {
    if (weight.size(axis) > 1 && weight.stride(axis) != expected) return false;
    expected *= weight.size(axis);
  }
  return channels > 0;
}

Entry make_entry(const Tensor& weight) {
  const int64_t d = weight.dim();
  BDP_CHECK(d == 2 || d == 4 || d == 5, "a weight must have 2, 4 or 5 dimensions, got ", d);
  const int64_t count = d == 5 ? weight.size(0) * weight.size(1) : weight.size(0);
  const int64_t channels = weight.size(d == 5 ? 2 : 1);
  const int64_t kernel = d == 2 ? 1 : weight.size(d - 2) * weight.size(d - 1);
  const bool contiguous = weight.is_contiguous();
  const bool transposed = !contiguous && is_channels_last_filters(weight);
  const Tensor dense = contiguous || transposed ? weight : torch::stable::contiguous(weight);
  const int64_t rows = transposed ? kernel : channels, cols = transposed ? channels : kernel;
  return {dense, {dense.const_data_ptr(), core_dtype(dense.scalar_type()), count, rows, cols}};
}

template <typename T>
void run(const std::vector<Entry>& entries, int64_t total_work, T* out) {
  // Threads get equal shares of the estimated work, not of the filters: batches of the last layers take ten times as
  // long as those of the first. The batch of a filter never depends on the shares.
  constexpr int64_t kGrain = 1 << 16;
  torch::stable::parallel_for(0, total_work, kGrain, [&](int64_t begin, int64_t end) {
    int64_t needed = 0;
    for (const Entry& entry : entries) needed = std::max(needed, core::spectral_scratch(entry.bank));
    const AlignedBuffer scratch(needed * static_cast<int64_t>(sizeof(double)));
    double norms[core::kBatch];
    for (const Entry& entry : entries) {
      const int64_t cost = entry.bank.batch_cost();
      // Batches whose work starts within [begin, end).
      const int64_t first =
          std::clamp(ceil_div(std::max<int64_t>(begin - entry.work, 0), cost), int64_t{0}, entry.bank.batches());
      const int64_t last =
          std::clamp(ceil_div(std::max<int64_t>(end - entry.work, 0), cost), int64_t{0}, entry.bank.batches());
      for (int64_t batch = first; batch < last; ++batch) {
        core::spectral_norms(entry.bank, batch, static_cast<double*>(scratch.get()), norms);
        const int64_t start = batch * core::kBatch;
        for (int64_t i = start; i < std::min(start + core::kBatch, entry.bank.count); ++i) {
          double norm = norms[i - start];
          if (entry.scale) norm *= std::fabs(read_scalar(entry.scale, entry.scale_dtype, i));
          out[entry.output + i] = static_cast<T>(norm);
        }
      }
    }
  });
}

Tensor filter_spectral_norms_cpu(std::vector<Tensor> weights, std::vector<OptionalTensor> scales) {
  BDP_CHECK(weights.size() == scales.size(), "got ", weights.size(), " weights and ", scales.size(), " scales");
  std::vector<Entry> entries;
  std::vector<Tensor> kept;
  int64_t outputs = 0, work = 0;
  bool wide = false;
  for (size_t i = 0; i < weights.size(); ++i) {
    Entry entry = make_entry(weights[i]);
    wide = wide || entry.bank.dtype == core::Dtype::kDouble;
    if (scales[i]) {
      BDP_CHECK(scales[i]->numel() == entry.bank.count, "scale ", i, " has ", scales[i]->numel(), " elements for ",
                entry.bank.count, " filters");
      BDP_CHECK(is_floating(scales[i]->scalar_type()), "a scale must have a floating dtype");
      kept.push_back(torch::stable::contiguous(*scales[i]));
      entry.scale = kept.back().const_data_ptr();
      entry.scale_dtype = kept.back().scalar_type();
    }
    entry.output = outputs;
    entry.work = work;
    outputs += entry.bank.count;
    work += entry.bank.batches() * entry.bank.batch_cost();
    entries.push_back(std::move(entry));
  }
  const Tensor out = torch::stable::empty({outputs}, wide ? ScalarType::Double : ScalarType::Float);
  if (outputs == 0) return out;
  if (wide) {
    run(entries, work, static_cast<double*>(out.mutable_data_ptr()));
  } else {
    run(entries, work, static_cast<float*>(out.mutable_data_ptr()));
  }
  return out;
}

}  // namespace
}  // namespace bdprune

STABLE_TORCH_LIBRARY_IMPL(bdprune, CPU, m)
{
  m.impl("filter_spectral_norms", TORCH_BOX(&bdprune::filter_spectral_norms_cpu));
}
