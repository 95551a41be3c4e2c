// Largest singular values of many small matrices: the torch-free part of filter_spectral_norms.
//
// A filter is a dense row-major [rows, cols] matrix M. The Gram matrix on its smaller side is computed for eight
// filters in parallel, one filter per lane, or, for 3x3 filters with many channels, by row_gram.h for one filter after
// another. eigen_lanes.h computes its largest eigenvalue. So a filter's bits depend only on the filter, not on its
// neighbours, the list or the number of threads.
//
// Precision: the largest eigenvalue of a Gram matrix is well conditioned. Products of float32 and narrower input are
// summed in float over at most 32 positions and a few such runs (row_gram.h: eight), then in double, because a register
// holds twice as many floats as doubles. The relative error of sigma is below 1e-7 on random filters and below 3e-7 if
// all rounding errors have the same sign (all elements equal), less than that of float32 svdvals. Filters whose squares
// leave the range of float are multiplied by a power of two and summed again. With float64 input everything is double,
// first scaled by a power of two, and the relative error is a few 1e-16.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "lanes.h"

namespace bdprune::core {

// Filters of one bank that are processed in one batch.
inline constexpr int kBatch = 2 * kLanes;

// The filters of one weight tensor: `count` dense row-major [rows, cols] matrices, one after the other.
struct FilterBank {
  const void* data;
  Dtype dtype;
  int64_t count, rows, cols;

  int64_t side() const { return rows < cols ? rows : cols; }    // of the Gram matrix
  int64_t length() const { return rows < cols ? cols : rows; }  // length of the sums in the Gram matrix
  int64_t batches() const { return (count + kBatch - 1) / kBatch; }
  // Work of one batch in multiply-adds, for dividing it among threads.
  int64_t batch_cost() const;
};

// Doubles of scratch, aligned to 64 bytes, that a call on this bank needs.
int64_t spectral_scratch(const FilterBank& bank);

// Norms of the filters [batch * kBatch, (batch + 1) * kBatch) of the bank, up to its end; `out` holds kBatch doubles.
// A filter with a NaN or Inf gives NaN, an empty one 0.
void spectral_norms(const FilterBank& bank, int64_t batch, double* scratch, double* out);

}  // namespace bdprune::core
