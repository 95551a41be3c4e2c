// Second moments of the channels of a feature map: the torch-free part of channel_moments_update_.
//
// The map is processed in chunks of kChunk positions. A chunk is packed, shifted by a provisional mean, into panels of
// channels in the compute type (float64 for float64 input, otherwise float32). The products of the panels accumulate in
// registers and are added to the float64 result once per chunk. With the shift, float32 within a chunk is accurate: the
// error of the correlation is 1e-8 at a mean of 30 standard deviations, where unshifted float32 has an error of 3e-4.
//
// Why not a library GEMM: these products need only half of a GEMM's work (the pairs of panels i <= j), the packing also
// computes the shift and the sums, and nothing of the size of x is allocated. Measured with one thread on an AVX-512
// EPYC, ms per batch for this kernel, torch.corrcoef, and shift + GEMM alone: [64, 64, 32, 32] 2.9, 23, 30;
// [128, 128, 16, 16] 3.9, 14, 17; [128, 512, 4, 4] 3.1, 11, 12. On AVX2 it is 1.5 to 4 times as fast (channels_last
// with 64 channels: equal).
//
// Both stages compute each of their outputs in one place and in a fixed order, so the bits do not depend on how the
// ranges are split among threads.
//
// Source of the shifted merge: Schubert and Gertz, Numerically stable parallel computation of (co-)variance, SSDBM
// 2018.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "lanes.h"

namespace bdprune::core {

// Feature map [samples, channels, positions], or [samples, positions, channels] with channels_fastest, dense.
struct FeatureView {
  const void* data;
  Dtype dtype;
  int64_t samples, channels, positions;
  bool channels_fastest;

  bool is_double() const { return dtype == Dtype::kDouble; }
  int64_t octets() const { return (channels + kLanes - 1) / kLanes; }
};

inline constexpr int64_t kChunk = 256;

// Running float64 state, each [channels]; `squares` is the sum of squares of the current sample and starts at zero.
struct MomentState {
  double* sum;
  double* norm_sum;
  double* squares;
};

// Panels of channels in a packed chunk, the bytes of its buffer (to be aligned to 64), and the pairs of panels i <= j.
int64_t moment_panels(const FeatureView& x);
int64_t moment_buffer_bytes(const FeatureView& x);
inline int64_t moment_pairs(const FeatureView& x) { return moment_panels(x) * (moment_panels(x) + 1) / 2; }

// Packs the positions [start, start + count) (counted over all samples, count <= kChunk) of the channel octets
// [begin, end), and adds them to the state. Chunks must come in order.
void pack_moments(const FeatureView& x, const double* shift, int64_t start, int64_t count, int64_t begin, int64_t end,
                  void* buffer, const MomentState& state);

// Adds the products of the panel pairs [begin, end) over a packed chunk to the upper triangle (and the diagonal blocks)
// of cross [channels, channels].
void cross_moments(const FeatureView& x, int64_t count, int64_t begin, int64_t end, const void* buffer, double* cross);

}  // namespace bdprune::core
