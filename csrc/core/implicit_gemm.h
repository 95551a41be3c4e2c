// The index logic of a convolution as a matrix product, for host and device code: which element a row, a tap and a
// channel stand for, how a grid of blocks is cut into tiles, and where the fragments of mma.sync lie.
//
// Forward, a row of the product is an output position and a column an output channel; the sum runs over the taps of the
// filter and the input channels of the group. The input gradient is the same product with the roles exchanged: a row is
// an input pixel, a column an input channel, and the sum runs over taps and output channels.
#pragma once

#include <cstdint>

#include "macros.h"

namespace bdprune::core {

struct ConvShape {
  int64_t height, width;          // of an input map
  int64_t out_height, out_width;  // of an output map
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_height, pad_width;
  int64_t dilation_height, dilation_width;

  BDP_HD int64_t taps() const { return kernel_height * kernel_width; }
};

// Along one axis: the input coordinate that a tap reads for an output coordinate, and the output coordinate that a tap
// carries an input coordinate to; -1 where there is none.
BDP_HD inline int64_t input_coordinate(int64_t out, int64_t tap, int64_t stride, int64_t pad, int64_t dilation,
                                       int64_t size) {
  const int64_t in = out * stride - pad + tap * dilation;
  return in >= 0 && in < size ? in : -1;
}

BDP_HD inline int64_t output_coordinate(int64_t in, int64_t tap, int64_t stride, int64_t pad, int64_t dilation,
                                        int64_t size) {
  const int64_t scaled = in + pad - tap * dilation;
  if (scaled < 0 || scaled % stride != 0 || scaled / stride >= size) return -1;
  return scaled / stride;
}

// The position, counted by rows, of the map that is read for position `at` of the map that the rows of the product run
// over; -1 where the tap falls outside. kGradient: of the input gradient.
template <bool kGradient>
BDP_HD inline int64_t source_position(const ConvShape& s, int64_t at, int64_t tap) {
  const int64_t tap_y = tap / s.kernel_width, tap_x = tap % s.kernel_width;
  const int64_t width = kGradient ? s.width : s.out_width;
  const int64_t y = at / width, x = at % width;
  const auto along = kGradient ? output_coordinate : input_coordinate;
  const int64_t from_y =
      along(y, tap_y, s.stride_height, s.pad_height, s.dilation_height, kGradient ? s.out_height : s.height);
  const int64_t from_x =
      along(x, tap_x, s.stride_width, s.pad_width, s.dilation_width, kGradient ? s.out_width : s.width);
  return from_y < 0 || from_x < 0 ? -1 : from_y * (kGradient ? s.out_width : s.width) + from_x;
}

// A block's tile: neighbouring blocks differ in their rows first, so that they read the same weights.
struct ConvTile {
  int64_t map, group, column_tile, row_tile;
};

BDP_HD inline ConvTile conv_tile(int64_t block, int64_t row_tiles, int64_t column_tiles, int64_t groups) {
  const int64_t columns = block / row_tiles, group = columns / column_tiles;
  return {group / groups, group % groups, columns % column_tiles, block % row_tiles};
}

// Where element i of a lane's fragment lies in its matrix: mma.sync.aligned of shape m16n8k8 (TF32) and m16n8k16
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

// The bits of a float32 rounded to TF32's 10 bits of mantissa, halves away from zero as cvt.rna does; Inf and NaN stay.
BDP_HD constexpr uint32_t round_to_tf32(uint32_t bits) {
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace bdprune::core
