// winograd_conv2d and its gradients on the CPU: divides tiles, panels of filters and parts of the products among the
// threads. Scratch is allocated once per call, or once per thread if each needs its own.
#include "../core/winograd_conv2d.h"

#include <algorithm>
#include <optional>

#include "kernels.h"

namespace bdprune {
namespace {

constexpr int64_t kTilesGrain = 24;
constexpr int64_t kFiltersGrain = 1 << 11;

AlignedBuffer floats(int64_t count) { return AlignedBuffer(count * static_cast<int64_t>(sizeof(float))); }

float* data_of(const AlignedBuffer& buffer) { return static_cast<float*>(buffer.get()); }

// Memory for transformed filters, or for sums of that size, which a thread keeps for its next call. malloc returns
// blocks of more than 32 MB to the system, and mapping their pages again would take longer than the transform itself.
class FilterMemory {
 public:
  explicit FilterMemory(int64_t count) {
    static constexpr int64_t kKeptFloats = 16 << 20;
    thread_local std::optional<AlignedBuffer> kept;
    thread_local int64_t size = 0;
    if (count > kKeptFloats) {
      own_ = floats(count);
    } else if (!kept || count > size) {
      kept.reset();  // before the larger one is allocated
      kept = floats(count);
      size = count;
    }
    data_ = data_of(own_ ? *own_ : *kept);
  }
  float* data() const { return data_; }  // for use by any thread

 private:
  std::optional<AlignedBuffer> own_;
  float* data_;
};

AlignedBuffer zeros(int64_t count) {
  AlignedBuffer buffer = floats(count);
  std::fill_n(data_of(buffer), count, 0.0f);
  return buffer;
}

// x [N, C, H, W] in channels_last, copied if it is not.
Tensor dense_map(const Tensor& x) {
  BDP_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float, "expected a float32 map [N, C, H, W], got ", x.dim(),
            " dimensions");
  return is_channels_fastest(x) ? x : torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

core::WinogradMap map_of(const Tensor& x) { return {x.size(0), x.size(2), x.size(3), x.size(1)}; }

Tensor empty_map(int64_t samples, int64_t channels, int64_t height, int64_t width) {
  return torch::stable::empty({samples, channels, height, width}, ScalarType::Float, std::nullopt, std::nullopt,
                              std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

core::WinogradFilters filters_of(const Tensor& weight) {
  BDP_CHECK(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.scalar_type() == ScalarType::Float,
      "expected a float32 weight [O, I, 3, 3], got ", weight.dim(), " dimensions");
  return {static_cast<const float*>(weight.const_data_ptr()),
          weight.size(0),
          weight.size(1),
          weight.stride(0),
          weight.stride(1),
          weight.stride(2),
          weight.stride(3)};
}

// A float32 vector with one entry for each filter, dense; null if there is none.
class PerFilter {
 public:
  PerFilter(const char* name, const OptionalTensor& values, int64_t filters) {
    if (!values) return;
    BDP_CHECK(values->scalar_type() == ScalarType::Float && values->dim() == 1 && values->size(0) == filters, name,
              " must be float32 with one entry for each of ", filters, " filters, got ", values->numel());
    dense_ = torch::stable::contiguous(*values);
  }
  const float* data() const { return dense_ ? static_cast<const float*>(dense_->const_data_ptr()) : nullptr; }

 private:
  OptionalTensor dense_;
};

// The convolution of x with `filters`.
Tensor convolve(const Tensor& x, const core::WinogradFilters& filters, const core::WinogradEpilogue& epilogue) {
  BDP_CHECK(x.size(1) == filters.inputs, "expected ", filters.inputs, " channels, got ", x.size(1));
  const core::WinogradMap map = map_of(x);
  const Tensor out = empty_map(map.samples, filters.outputs, map.height, map.width);
  const FilterMemory transformed(core::winograd_filter_floats(filters.inputs, filters.outputs));
  const int64_t grain = ceil_div(kFiltersGrain, filters.inputs);
  torch::stable::parallel_for(0, core::winograd_panels(filters.outputs), grain, [&](int64_t begin, int64_t end) {
    core::winograd_filters(filters, begin, end, transformed.data());
  });
  const AlignedBuffer padding = zeros(map.channels);
  const float* from = static_cast<const float*>(x.const_data_ptr());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, map.tiles(), kTilesGrain, [&](int64_t begin, int64_t end) {
    const AlignedBuffer scratch = floats(core::winograd_scratch(filters.inputs, filters.outputs));
    core::winograd_forward(map, from, transformed.data(), epilogue, filters.outputs, data_of(padding), begin, end,
                           data_of(scratch), to);
  });
  return out;
}

Tensor winograd_conv2d_cpu(Tensor x, Tensor weight, OptionalTensor bias) {
  const core::WinogradFilters filters = filters_of(weight);
  const PerFilter offsets("bias", bias, filters.outputs);
  return convolve(dense_map(x), filters, {offsets.data()});
}

std::tuple<Tensor, Tensor> winograd_masked_conv2d_cpu(Tensor x, Tensor weight, Tensor mask, OptionalTensor bias,
                                                      bool need_z) {
  const core::WinogradFilters filters = filters_of(weight);
  const PerFilter offsets("bias", bias, filters.outputs), factors("mask", mask, filters.outputs);
  const Tensor z = need_z ? empty_map(x.size(0), filters.outputs, x.size(2), x.size(3))
                          : torch::stable::empty({0}, ScalarType::Float);
  float* unmasked = need_z ? static_cast<float*>(z.mutable_data_ptr()) : nullptr;
  return {convolve(dense_map(x), filters, {offsets.data(), factors.data(), unmasked}), z};
}

Tensor winograd_conv2d_input_grad_cpu(Tensor grad, Tensor weight, OptionalTensor mask) {
  const core::WinogradFilters filters = filters_of(weight);
  const PerFilter factors("mask", mask, filters.outputs);
  return convolve(dense_map(grad), filters.adjoint(factors.data()), {});
}

Tensor winograd_conv2d_weight_grad_cpu(Tensor grad, Tensor x) {
  const Tensor outputs = dense_map(grad), inputs = dense_map(x);
  const core::WinogradMap out = map_of(outputs), in = map_of(inputs);
  BDP_CHECK(out.samples == in.samples && out.height == in.height && out.width == in.width,
            "grad and x must have the same samples and positions");
  Tensor result = empty_map(out.channels, in.channels, 3, 3);
  if (in.tiles() == 0) return torch::stable::zero_(result);
  const AlignedBuffer left = zeros(core::winograd_chunk_floats(in.channels));
  const AlignedBuffer right = zeros(core::winograd_chunk_floats(out.channels));
  const FilterMemory sums(core::winograd_sum_floats(in.channels, out.channels));
  const AlignedBuffer padding = zeros(in.channels);
  const float* x_data = static_cast<const float*>(inputs.const_data_ptr());
  const float* grad_data = static_cast<const float*>(outputs.const_data_ptr());
  for (int64_t first = 0; first < in.tiles(); first += core::kWinogradChunk) {
    const int64_t last = std::min(first + core::kWinogradChunk, in.tiles());
    torch::stable::parallel_for(first, last, kTilesGrain, [&](int64_t begin, int64_t end) {
      core::winograd_inputs(in, x_data, data_of(padding), first, begin, end, data_of(left));
      core::winograd_gradients(out, grad_data, first, begin, end, data_of(right));
    });
    const core::WinogradChunk chunk{in.channels, out.channels, last - first};
    torch::stable::parallel_for(0, core::kWinogradParts, 1, [&](int64_t begin, int64_t end) {
      core::winograd_products(chunk, data_of(left), data_of(right), first == 0, begin, end, sums.data());
    });
  }
  const core::WinogradFilters shape = filters_of(result);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  torch::stable::parallel_for(
      0, core::winograd_panels(out.channels), ceil_div(kFiltersGrain, in.channels),
      [&](int64_t begin, int64_t end) { core::winograd_weight_grad(sums.data(), shape, begin, end, to); });
  return result;
}

}  // namespace
}  // namespace bdprune

STABLE_TORCH_LIBRARY_IMPL(bdprune, CPU, m)
{
  m.impl("winograd_conv2d", TORCH_BOX(&bdprune::winograd_conv2d_cpu));
  m.impl("winograd_masked_conv2d", TORCH_BOX(&bdprune::winograd_masked_conv2d_cpu));
  m.impl("winograd_conv2d_input_grad", TORCH_BOX(&bdprune::winograd_conv2d_input_grad_cpu));
  m.impl("winograd_conv2d_weight_grad", TORCH_BOX(&bdprune::winograd_conv2d_weight_grad_cpu));
}
