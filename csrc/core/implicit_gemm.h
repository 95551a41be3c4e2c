// The index logic of a convolution as a matrix product, for host and device code: the element for a row, a tap and a
// channel; the tiles of a grid of blocks; and the layout of the fragments of mma.sync.
//
// In the forward pass, a row of the product is an output position and a column an output channel; the sum runs over the
// taps of the filter and the input channels of the group. The input gradient is the same product with exchanged roles:
// a row is an input pixel, a column an input channel, and the sum runs over taps and output channels.
#pragma once

#include <cstdint>

#include "macros.h"

namespace bdprune::core {

// A block computes a tile of the product, summed in chunks of kConvDepth channels.
inline constexpr int kConvThreads = 128, kConvRows = 64, kConvColumns = 64, kConvDepth = 32;

// Largest size, stride, padding and dilation: coordinates are 32-bit, so that divisions are cheap.
inline constexpr int64_t kConvLargest = (int64_t{1} << 30) - 1;

struct ConvShape {
  int height, width;          // of an input map
  int out_height, out_width;  // of an output map
  int kernel_height, kernel_width;
  int stride_height, stride_width;
  int pad_height, pad_width;
  int dilation_height, dilation_width;
};

// Along one axis: the input coordinate that a tap reads for an output coordinate, and the output coordinate that a tap
// maps an input coordinate to; -1 if there is none.
BDP_HD inline int input_coordinate(int out, int tap, int stride, int pad, int dilation, int size) {
  const int in = out * stride - pad + tap * dilation;
  return in >= 0 && in < size ? in : -1;
}

BDP_HD inline int output_coordinate(int in, int tap, int stride, int pad, int dilation, int size) {
  const int scaled = in + pad - tap * dilation;
  if (scaled < 0 || scaled % stride != 0 || scaled / stride >= size) return -1;
  return scaled / stride;
}

// The position (y, x) of the other map, as a row-major index, for position (y, x) of the map that the rows of the
// product run over; -1 if the tap is outside. kGradient: for the input gradient.
template <bool kGradient>
BDP_HD inline int64_t source_position(const ConvShape& s, int y, int x, int tap_y, int tap_x) {
  const auto along = kGradient ? output_coordinate : input_coordinate;
  const int from_y =
      along(y, tap_y, s.stride_height, s.pad_height, s.dilation_height, kGradient ? s.out_height : s.height);
  const int from_x = along(x, tap_x, s.stride_width, s.pad_width, s.dilation_width, kGradient ? s.out_width : s.width);
  return from_y < 0 || from_x < 0 ? -1 : int64_t{from_y} * (kGradient ? s.out_width : s.width) + from_x;
}

// Whether every mask of [begin, end) is 0.
BDP_HD inline bool all_zero(const float* mask, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    if (mask[c] != 0) return false;
  }
  return true;
}

// The steps in which a block sums its tile: an outer loop over chunks of channels, an inner loop over taps. With a mask
// over the channels, chunks with only zero masks are skipped.
struct ConvWalk {
  int64_t depth;
  const float* mask;  // null: none
  int64_t first = 0;  // channel of the chunk
  int tap_y = 0, tap_x = 0;

  BDP_HD ConvWalk(int64_t depth_, const float* mask_) : depth(depth_), mask(mask_) { skip(); }

  BDP_HD bool done() const { return first >= depth; }

  BDP_HD void next(const ConvShape& s) {
    if (++tap_x < s.kernel_width) return;
    tap_x = 0;
    if (++tap_y < s.kernel_height) return;
    tap_y = 0;
    first += kConvDepth;
    skip();
  }

 private:
  BDP_HD void skip() {
    while (mask && !done() && all_zero(mask, first, first + kConvDepth < depth ? first + kConvDepth : depth)) {
      first += kConvDepth;
    }
  }
};

// The part of an operand [64 lines, kConvDepth] that a thread stages in its turn: kWidth adjacent elements along the
// depth, or single elements, with adjacent lines on adjacent threads.
struct StagePlace {
  int line, depth;
};

template <int kWidth>
BDP_HD constexpr StagePlace stage_by_depth(int thread, int turn) {
  const int unit = thread + turn * kConvThreads;
  return {unit / (kConvDepth / kWidth), unit % (kConvDepth / kWidth) * kWidth};
}

BDP_HD constexpr StagePlace stage_by_line(int thread, int turn) {
  const int unit = thread + turn * kConvThreads;
  return {unit % kConvRows, unit / kConvRows};
}
static_assert(kConvRows == kConvColumns);

// How the blocks of an input gradient divide the sum for the gradient of the mask. A row tile's share of the output
// positions of all samples is located where its own input positions are, so that its taps read the same data again. Its
// column tiles divide the channels. Every position and channel belongs to exactly one block.
struct MaskSplit {
  int64_t rows, channels;  // positions of all samples and channels of a group, in the output's maps
  int64_t rows_each, channels_each, splits, every;

  MaskSplit() = default;

  BDP_HD MaskSplit(int64_t rows_, int64_t channels_, int64_t row_tiles, int64_t column_tiles)
      : rows(rows_), channels(channels_) {
    const int64_t wanted = (rows + kConvRows - 1) / kConvRows;
    const int64_t most = wanted < row_tiles ? wanted : row_tiles;
    rows_each = (rows + most - 1) / most;
    splits = (rows + rows_each - 1) / rows_each;
    every = row_tiles / splits;
    channels_each = (channels + column_tiles - 1) / column_tiles;
  }

  // The split of a row tile, or -1 if it has none.
  BDP_HD int64_t of(int64_t row_tile) const {
    return row_tile % every == 0 && row_tile / every < splits ? row_tile / every : -1;
  }
};

// A block's tile: adjacent blocks differ in their rows first, so that they read the same weights.
struct ConvTile {
  int64_t map, group, column_tile, row_tile;
};

BDP_HD inline ConvTile conv_tile(int64_t block, int64_t row_tiles, int64_t column_tiles, int64_t groups) {
  const int64_t columns = block / row_tiles, group = columns / column_tiles;
  return {group / groups, group % groups, columns % column_tiles, block % row_tiles};
}

// The position of element i of a lane's fragment in its matrix: mma.sync.aligned of shape m16n8k8 (TF32) and m16n8k16
// (16-bit types), with A [16, k] by rows, B [k, 8] by columns and C [16, 8]. Source: PTX ISA, section on warp-level
// matrix fragments.
struct Place {
  int row, column;
};

BDP_HD constexpr Place a_place_k8(int lane, int i) { return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4}; }
BDP_HD constexpr Place b_place_k8(int lane, int i) { return {lane % 4 + i * 4, lane / 4}; }
BDP_HD constexpr Place a_place_k16(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}
BDP_HD constexpr Place b_place_k16(int lane, int i) { return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4}; }
BDP_HD constexpr Place c_place(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// The bits of a float32 rounded to TF32's 10 bits of mantissa, ties away from zero like cvt.rna; keeps Inf and NaN.
BDP_HD constexpr uint32_t round_to_tf32(uint32_t bits) {
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace bdprune::core
