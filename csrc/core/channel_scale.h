// One channel mask times a feature map, and its backward: the torch-free part of channel_scale.
//
// A block is a run of `rows` rows of `width` elements with known channels. Positions fastest: a row is one channel of
// one sample and has one mask value. Channels fastest: a row is one position and has one mask value per column.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace bdprune::core {

// out = z * mask over the rows [begin, end) of z [rows, width]; row r has mask[r % channels].
void scale_rows(Dtype dtype, const void* z, const double* mask, int64_t channels, int64_t width, int64_t begin,
                int64_t end, void* out);

// out = z * mask over the rows [begin, end) of z [rows, channels].
void scale_columns(Dtype dtype, const void* z, const double* mask, int64_t channels, int64_t begin, int64_t end,
                   void* out);

// Backward over the rows [begin, end): dz = grad * mask unless null, dots[r] = sum of grad * z over row r unless null.
void scale_rows_backward(Dtype dtype, const void* grad, const void* z, const double* mask, int64_t channels,
                         int64_t width, int64_t begin, int64_t end, void* dz, double* dots);

// Backward over the rows [begin, end): dz as above, dots[c] = sum of grad * z over these rows of column c unless null.
void scale_columns_backward(Dtype dtype, const void* grad, const void* z, const double* mask, int64_t channels,
                            int64_t begin, int64_t end, void* dz, double* dots);

}  // namespace bdprune::core
