#include "channel_moments.h"

#include <algorithm>
#include <type_traits>

#include "isa.h"

namespace bdprune::core {
namespace {

// A panel is 128 bytes wide: two registers of AVX-512.
template <typename T>
constexpr int64_t kPanel = 128 / sizeof(T);

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename C>
using Octet = std::conditional_t<std::is_same_v<C, double>, v8d, v8f>;

BDP_INLINE v8d to_double(const v8f& x) { return __builtin_convertvector(x, v8d); }
BDP_INLINE v8d to_double(const v8d& x) { return x; }

BDP_INLINE v8f load_octet(const float* p) { return load_float(p); }
BDP_INLINE v8f load_octet(const Half* p) { return load_float(p); }
BDP_INLINE v8f load_octet(const BFloat16* p) { return load_float(p); }
BDP_INLINE v8d load_octet(const double* p) { return load<v8d>(p); }

BDP_INLINE void transpose_octets(v8f (&r)[8]) { transpose(r); }
BDP_INLINE void transpose_octets(v8d (&r)[8]) {
  for (int i = 0; i < 8; ++i) {
    for (int j = i + 1; j < 8; ++j) {
      const double swapped = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = swapped;
    }
  }
}

// Packs one octet of channels: reads the positions in order and keeps the sums in registers.
template <typename T>
struct OctetPacker {
  using C = Compute<T>;
  using V = Octet<C>;

  C* out;  // destination of the next position, kPanel<C> apart
  V shift;
  v8d sum, squares;

  BDP_INLINE void put(const V& x) {
    const V centred = x - shift;
    store(out, centred);
    out += kPanel<C>;
    sum += to_double(centred);
    const v8d wide = to_double(x);
    squares += wide * wide;
  }
};

// The octet of channels [c, c + 8) of one sample's positions [p, p + count).
template <typename T>
BDP_INLINE void pack_segment(const FeatureView& x, int64_t sample, int64_t c, int64_t p, int64_t count,
                             OctetPacker<T>& packer) {
  using V = typename OctetPacker<T>::V;
  const T* base = static_cast<const T*>(x.data) + sample * x.channels * x.positions;
  const int64_t by_channel = x.channels_fastest ? 1 : x.positions, by_position = x.channels_fastest ? x.channels : 1;
  const T* from = base + c * by_channel + p * by_position;
  const int64_t lanes = std::min<int64_t>(kLanes, x.channels - c);
  int64_t i = 0;
  if (lanes == kLanes && x.channels_fastest) {
    for (; i < count; ++i) packer.put(load_octet(from + i * by_position));
  } else if (lanes == kLanes) {
    for (; i + 8 <= count; i += 8) {
      V r[8];
#pragma GCC unroll 8
      for (int l = 0; l < 8; ++l) r[l] = load_octet(from + l * by_channel + i);
      transpose_octets(r);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) packer.put(r[k]);
    }
  }
  for (; i < count; ++i) {
    V value = {};
    for (int64_t l = 0; l < lanes; ++l) value[l] = widen(from[l * by_channel + i * by_position]);
    packer.put(value);
  }
}

template <typename T>
BDP_INLINE void pack_typed(const FeatureView& x, const double* shift, int64_t start, int64_t count, int64_t begin,
                           int64_t end, void* buffer, const MomentState& state) {
  using C = Compute<T>;
  for (int64_t octet = begin; octet < end; ++octet) {
    const int64_t c = octet * kLanes, lanes = std::min<int64_t>(kLanes, x.channels - c);
    OctetPacker<T> packer{static_cast<C*>(buffer) + c / kPanel<C> * kChunk * kPanel<C> + c % kPanel<C>, {}, {}, {}};
    v8d norm_sum = {};
    for (int64_t l = 0; l < lanes; ++l) {
      packer.shift[l] = static_cast<C>(shift[c + l]);
      packer.squares[l] = state.squares[c + l];
    }
    for (int64_t done = 0; done < count;) {
      const int64_t sample = (start + done) / x.positions, p = (start + done) % x.positions;
      const int64_t run = std::min(count - done, x.positions - p);
      pack_segment<T>(x, sample, c, p, run, packer);
      done += run;
      if (p + run < x.positions) continue;
      v8d norm = packer.squares / static_cast<double>(x.positions);
      for (int l = 0; l < kLanes; ++l) norm[l] = __builtin_sqrt(norm[l]);
      norm_sum += norm;
      packer.squares = v8d{};
    }
    for (int64_t l = 0; l < lanes; ++l) {
      state.sum[c + l] += packer.sum[l];
      state.norm_sum[c + l] += norm_sum[l];
      state.squares[c + l] = packer.squares[l];
    }
  }
}

// acc[i][j] = sum over the chunk of rows[i] * columns[j], with kRows x kWidth accumulators in registers; added to the
// part of cross inside the matrix.
template <typename C, int kBytes, int kRows, int kWidth>
BDP_INLINE void cross_tile(const C* rows, const C* columns, int64_t count, int64_t i0, int64_t j0, int64_t channels,
                           double* cross) {
  using V = typename Register<C, kBytes>::type;
  constexpr int kWide = kBytes / sizeof(C);
  V sums[kWidth][kRows] = {};
  for (int64_t k = 0; k < count; ++k, rows += kPanel<C>, columns += kPanel<C>) {
    V column[kWidth];
#pragma GCC unroll 2
    for (int w = 0; w < kWidth; ++w) column[w] = load<V>(columns + w * kWide);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int w = 0; w < kWidth; ++w) sums[w][i] += rows[i] * column[w];
    }
  }
  const int64_t valid = std::min<int64_t>(kWidth * kWide, channels - j0);
  for (int i = 0; i < kRows && i0 + i < channels; ++i) {
    C line[kWidth * kWide];
    for (int w = 0; w < kWidth; ++w) store(line + w * kWide, sums[w][i]);
    double* out = cross + (i0 + i) * channels + j0;
    for (int64_t j = 0; j < valid; ++j) out[j] += line[j];
  }
}

template <typename C, int kBytes, int kRows>
BDP_INLINE void cross_typed(const FeatureView& x, int64_t count, int64_t begin, int64_t end, const void* buffer,
                            double* cross) {
  constexpr int64_t kColumns = 2 * kBytes / sizeof(C);
  const int64_t panels = moment_panels(x);
  int64_t pair = 0;
  for (int64_t a = 0; a < panels; ++a) {
    for (int64_t b = a; b < panels; ++b, ++pair) {
      if (pair < begin || pair >= end) continue;
      const C* rows = static_cast<const C*>(buffer) + a * kChunk * kPanel<C>;
      const C* columns = static_cast<const C*>(buffer) + b * kChunk * kPanel<C>;
      for (int64_t i = 0; i < kPanel<C>; i += kRows) {
        const int64_t i0 = a * kPanel<C> + i;
        if (i0 >= x.channels) break;
        for (int64_t j = 0; j < kPanel<C>; j += kColumns) {
          const int64_t j0 = b * kPanel<C> + j;
          if (j0 >= x.channels || j0 + kColumns <= i0) continue;
          constexpr int64_t kHalf = kColumns / 2;
          if (j0 + kHalf > i0) {
            cross_tile<C, kBytes, kRows, 2>(rows + i, columns + j, count, i0, j0, x.channels, cross);
          } else if (j0 + kHalf < x.channels) {  // the left half is below the diagonal, which is never read
            cross_tile<C, kBytes, kRows, 1>(rows + i, columns + j + kHalf, count, i0, j0 + kHalf, x.channels, cross);
          }
        }
      }
    }
  }
}

BDP_INLINE void pack_any(const FeatureView& x, const double* shift, int64_t start, int64_t count, int64_t begin,
                         int64_t end, void* buffer, const MomentState& state) {
  switch (x.dtype) {
    case Dtype::kFloat:
      return pack_typed<float>(x, shift, start, count, begin, end, buffer, state);
    case Dtype::kDouble:
      return pack_typed<double>(x, shift, start, count, begin, end, buffer, state);
    case Dtype::kHalf:
      return pack_typed<Half>(x, shift, start, count, begin, end, buffer, state);
    case Dtype::kBFloat16:
      return pack_typed<BFloat16>(x, shift, start, count, begin, end, buffer, state);
  }
}

template <int kBytes, int kRows>
BDP_INLINE void cross_any(const FeatureView& x, int64_t count, int64_t begin, int64_t end, const void* buffer,
                          double* cross) {
  if (x.is_double()) return cross_typed<double, kBytes, kRows>(x, count, begin, end, buffer, cross);
  cross_typed<float, kBytes, kRows>(x, count, begin, end, buffer, cross);
}

#if BDP_X86
BDP_TARGET_AVX512 void pack_avx512(const FeatureView& x, const double* shift, int64_t start, int64_t count,
                                   int64_t begin, int64_t end, void* buffer, const MomentState& state) {
  pack_any(x, shift, start, count, begin, end, buffer, state);
}
BDP_TARGET_AVX2 void pack_avx2(const FeatureView& x, const double* shift, int64_t start, int64_t count, int64_t begin,
                               int64_t end, void* buffer, const MomentState& state) {
  pack_any(x, shift, start, count, begin, end, buffer, state);
}
BDP_TARGET_AVX512 void cross_avx512(const FeatureView& x, int64_t count, int64_t begin, int64_t end, const void* buffer,
                                    double* cross) {
  cross_any<64, 8>(x, count, begin, end, buffer, cross);
}
BDP_TARGET_AVX2 void cross_avx2(const FeatureView& x, int64_t count, int64_t begin, int64_t end, const void* buffer,
                                double* cross) {
  cross_any<32, 4>(x, count, begin, end, buffer, cross);
}
#endif

}  // namespace

int64_t moment_panels(const FeatureView& x) {
  const int64_t panel = x.is_double() ? kPanel<double> : kPanel<float>;
  return (x.channels + panel - 1) / panel;
}

int64_t moment_buffer_bytes(const FeatureView& x) { return moment_panels(x) * kChunk * 128; }

void pack_moments(const FeatureView& x, const double* shift, int64_t start, int64_t count, int64_t begin, int64_t end,
                  void* buffer, const MomentState& state) {
#if BDP_X86
  if (isa() == Isa::kAvx512) return pack_avx512(x, shift, start, count, begin, end, buffer, state);
  if (isa() == Isa::kAvx2) return pack_avx2(x, shift, start, count, begin, end, buffer, state);
#endif
  pack_any(x, shift, start, count, begin, end, buffer, state);
}

void cross_moments(const FeatureView& x, int64_t count, int64_t begin, int64_t end, const void* buffer, double* cross) {
#if BDP_X86
  if (isa() == Isa::kAvx512) return cross_avx512(x, count, begin, end, buffer, cross);
  if (isa() == Isa::kAvx2) return cross_avx2(x, count, begin, end, buffer, cross);
#endif
  cross_any<16, 4>(x, count, begin, end, buffer, cross);
}

}  // namespace bdprune::core
