// Convolutions 3x3 with stride 1 and padding 1 by Winograd's minimal filtering F(4x4, 3x3): the torch-free part of
// winograd_conv2d and its gradients. Float32, maps dense in the order [samples, height, width, channels].
//
// A tile of 4x4 outputs needs 36 products per pair of channels instead of 144. The map is processed in blocks of tiles:
// their 6x6 inputs are transformed (B^T d B), multiplied with the transformed filters (G g G^T) as 36 matrix products
// [tiles, in_channels] x [in_channels, out_channels], and transformed back (A^T m A). The gradient of the input is the
// same convolution with the filters rotated by 180 degrees and transposed; that of the weight is the adjoint of the
// three steps.
//
// The points are 0, +-2/3, +-3/2 and infinity: their powers stay closer to one than those of the usual 0, +-1, +-2,
// which limits the rounding error to about twice that of a direct float32 convolution; and some terms vanish because
// 2/3 * 3/2 = 1.
//
// Every output is summed in an order that depends only on the shapes, so the bits do not depend on how the ranges are
// split among threads. Edges are padded with zeros. A NaN or Inf affects all 36 inputs of its tiles.
//
// Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016; on the choice of points
// Barabasz et al., Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks, TOMS
// 2020.
#pragma once

#include <cstdint>

namespace bdprune::core {

inline constexpr int kWinogradTile = 4;
inline constexpr int kWinogradParts = 36;  // elements of a transformed tile

// A dense map [samples, height, width, channels] and its tiles, counted over all samples.
struct WinogradMap {
  int64_t samples, height, width, channels;

  int64_t tiles_down() const { return (height + kWinogradTile - 1) / kWinogradTile; }
  int64_t tiles_across() const { return (width + kWinogradTile - 1) / kWinogradTile; }
  int64_t tiles() const { return samples * tiles_down() * tiles_across(); }
};

// Filters [outputs, inputs, 3, 3] with any strides, in elements, times input_scale [inputs] if that is not null.
// Rotated and transposed, they are the filters of the gradient of the input; a mask over the outputs then scales the
// inputs.
struct WinogradFilters {
  const float* data;
  int64_t outputs, inputs;
  int64_t output_stride, input_stride, row_stride, column_stride;
  const float* input_scale = nullptr;

  WinogradFilters adjoint(const float* mask) const {
    return {data + 2 * row_stride + 2 * column_stride,
            inputs,
            outputs,
            input_stride,
            output_stride,
            -row_stride,
            -column_stride,
            mask};
  }
};

// Post-processing of the sums y of a channel: unmasked = y + bias, out = unmasked * mask. Null means zero biases, masks
// of one, or no output of the unmasked map [samples, height, width, outputs].
struct WinogradEpilogue {
  const float* bias = nullptr;
  const float* mask = nullptr;
  float* unmasked = nullptr;
};

// Panels of output channels in transformed filters, and the floats of all panels. Must be aligned to 64 bytes, like all
// scratch here.
int64_t winograd_panels(int64_t outputs);
int64_t winograd_filter_floats(int64_t inputs, int64_t outputs);

// Transforms the panels [begin, end).
void winograd_filters(const WinogradFilters& filters, int64_t begin, int64_t end, float* transformed);

// Floats of scratch that a call of winograd_forward needs.
int64_t winograd_scratch(int64_t inputs, int64_t outputs);

// The outputs [samples, height, width, outputs] of the tiles [begin, end) of x; zeros [channels] is the padding.
void winograd_forward(const WinogradMap& x, const float* data, const float* transformed,
                      const WinogradEpilogue& epilogue, int64_t outputs, const float* zeros, int64_t begin, int64_t end,
                      float* scratch, float* out);

// The gradient of the weight is computed in chunks of at most kWinogradChunk tiles: both maps are transformed, and
// their products are added to sums over all tiles, which are transformed back at the end.
inline constexpr int64_t kWinogradChunk = 128;

struct WinogradChunk {
  int64_t inputs, outputs;  // channels
  int64_t tiles;
};

// Floats of a transformed chunk of one map, which must be zeros initially, and of the sums.
int64_t winograd_chunk_floats(int64_t channels);
int64_t winograd_sum_floats(int64_t inputs, int64_t outputs);

// The tiles [begin, end) of the chunk that starts at tile `first`, of x and of the gradient of the output.
void winograd_inputs(const WinogradMap& x, const float* data, const float* zeros, int64_t first, int64_t begin,
                     int64_t end, float* chunk);
void winograd_gradients(const WinogradMap& grad, const float* data, int64_t first, int64_t begin, int64_t end,
                        float* chunk);

// Adds the products of the parts [begin, end) of a chunk to the sums, or starts them with the first chunk.
void winograd_products(const WinogradChunk& chunk, const float* inputs, const float* gradients, bool first,
                       int64_t begin, int64_t end, float* sums);

// The panels [begin, end) of the gradient, which has the sizes and strides of `filters`.
void winograd_weight_grad(const float* sums, const WinogradFilters& filters, int64_t begin, int64_t end,
                          float* gradient);

}  // namespace bdprune::core
