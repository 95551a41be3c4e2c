#include "filter_spectral_norms.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

#include "eigen_lanes.h"
#include "isa.h"
#include "row_gram.h"
#include "tridiagonal.h"

namespace bdprune::core {
namespace {

constexpr int kOctets = kBatch / kLanes;

// Prefetch distance in each filter's stream, in elements.
constexpr int64_t kPrefetch = 256;

// Bytes of packed lanes: little more than half of a 32 KiB first-level cache; the rest is for streamed data.
constexpr int64_t kPackedBytes = 9 * 64 * 32;

// Number of products summed in float.
constexpr int64_t kRun = 32;

int64_t padded(int64_t side) { return side == 9 ? 9 : (side + 3) / 4 * 4; }

// Positions along the long side that are packed in one chunk: a multiple of 8, so that only the last run has a tail.
int64_t chunk_length(int64_t side, int64_t slot) {
  return std::max<int64_t>(16, kPackedBytes / (padded(side) * slot) / 8 * 8);
}

// The types for packing and multiplying filters. Products of float32 and narrower types are summed in float over runs
// of kRun, as are the runs of one chunk, and the chunks in double; float64 always uses double.
template <typename T>
using Number = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Eight values, one per filter.
template <typename T>
using Lanes = std::conditional_t<std::is_same_v<T, double>, v8d, v8f>;

// Eight filters of one bank, one per lane. Lanes beyond the last filter repeat it.
template <typename T>
struct Octet {
  const T* filter[kLanes];
  v8d factor;  // power of two that scales the filter's maximum to about 1 if squares would leave the range, else 1
};

// Elements [offset, offset + 8) of the eight filters; out[i] has those at offset + i. V is the register type.
template <typename V, typename T>
BDP_INLINE void load_eight(const Octet<T>& octet, int64_t offset, v8f (&out)[8]) {
  if constexpr (sizeof(V) < sizeof(v8f)) {
    // GCC would rearrange vectors wider than a register element by element.
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int first = quarter / 2 * 4, lane = quarter % 2 * 4;
      v4f r[4];
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) r[l] = load_four(octet.filter[lane + l] + offset + first);
      const v4f a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5),
                b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
      const v4f c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5),
                d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
      const v4f places[4] = {__builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
                             __builtin_shufflevector(b, d, 0, 1, 4, 5), __builtin_shufflevector(b, d, 2, 3, 6, 7)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(reinterpret_cast<float*>(&out[first + i]) + lane, places[i]);
    }
    return;
  }
  // Joining the halves of filters l and l + 4 while loading saves the last of three transpose rounds.
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    v8f r[4], a[4];
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
      const v4f low = load_four(octet.filter[l] + offset + 4 * half);
      const v4f high = load_four(octet.filter[l + 4] + offset + 4 * half);
      r[l] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
    }
    a[0] = __builtin_shufflevector(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[1] = __builtin_shufflevector(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15);
    a[2] = __builtin_shufflevector(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13);
    a[3] = __builtin_shufflevector(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
    out[4 * half] = __builtin_shufflevector(a[0], a[2], 0, 1, 8, 9, 4, 5, 12, 13);
    out[4 * half + 1] = __builtin_shufflevector(a[0], a[2], 2, 3, 10, 11, 6, 7, 14, 15);
    out[4 * half + 2] = __builtin_shufflevector(a[1], a[3], 0, 1, 8, 9, 4, 5, 12, 13);
    out[4 * half + 3] = __builtin_shufflevector(a[1], a[3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
}

template <typename V>
BDP_INLINE void load_eight(const Octet<double>& octet, int64_t offset, v8d (&out)[8]) {
  const double* const* f = octet.filter;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int64_t k = offset + i;
    out[i] = v8d{f[0][k], f[1][k], f[2][k], f[3][k], f[4][k], f[5][k], f[6][k], f[7][k]};
  }
}

template <typename T>
BDP_INLINE Lanes<T> load_one(const Octet<T>& octet, int64_t offset) {
  Lanes<T> out;
  for (int l = 0; l < kLanes; ++l) out[l] = widen(octet.filter[l][offset]);
  return out;
}

// Transposes the run [offset, offset + count) of the eight filters into lanes: element i is stored in row i / width,
// column i % width of `packed`, whose rows are `stride` slots of kAbreast octets apart.
template <typename V, int kAbreast, bool kScaled, typename T>
BDP_INLINE void pack(const Octet<T>& octet, int64_t offset, int64_t count, int64_t width, int64_t stride,
                     Lanes<T>* packed) {
  const Lanes<T> factor = __builtin_convertvector(octet.factor, Lanes<T>);
  int64_t column = 0;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    // Eight streams are more than the hardware prefetches well.
    if (i % 16 == 0) {
      for (int l = 0; l < kLanes; ++l) __builtin_prefetch(octet.filter[l] + offset + i + kPrefetch, 0, 2);
    }
    Lanes<T> eight[8] = {};
    load_eight<V>(octet, offset + i, eight);
    if (kScaled) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) eight[k] *= factor;
    }
    if (width == stride) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) packed[k * kAbreast] = eight[k];
      packed += 8 * kAbreast;
      continue;
    }
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      packed[column * kAbreast] = eight[k];
      if (++column == width) packed += stride * kAbreast, column = 0;
    }
  }
  for (; i < count; ++i) {
    packed[column * kAbreast] = load_one(octet, offset + i) * factor;
    if (++column == width) packed += stride * kAbreast, column = 0;
  }
}

// Packed filters as registers of V, and the sums of their products in the same layout. A slot is kSplit registers; a
// call processes one of them, since GCC spills vectors wider than a register.
template <typename V, int kSplit>
struct GramTask {
  const V* packed;
  int64_t rows, stride;
  V* sums;
};

// sums[i0.., j0..] = sum over the rows of packed of its columns i0.. times its columns j0.., with R x C accumulators in
// registers. With kUpper only the upper triangle.
template <int R, int C, bool kUpper, typename V, int kSplit>
BDP_INLINE void gram_block(const GramTask<V, kSplit>& task, int64_t i0, int64_t j0) {
  const V* packed = task.packed;
  for (int64_t start = 0; start < task.rows; start += kRun) {
    V acc[R][C] = {};
    for (int64_t row = std::min(kRun, task.rows - start); row > 0; --row, packed += task.stride * kSplit) {
      V left[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) left[i] = in_register(packed[(i0 + i) * kSplit]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) {
        const V right = kUpper ? left[j] : in_register(packed[(j0 + j) * kSplit]);
#pragma GCC unroll 8
        for (int i = 0; i < (kUpper ? j + 1 : R); ++i) acc[i][j] += left[i] * right;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int j = kUpper ? i : 0; j < C; ++j) {
        V& sum = task.sums[((i0 + i) * task.stride + j0 + j) * kSplit];
        sum = start == 0 ? acc[i][j] : sum + acc[i][j];
      }
    }
  }
}

// Block sizes by the number of registers: accumulators take half of the 32 of AVX-512 or of the 16 of the others. 3x3
// kernels, by far the most common, have their own splits of 9 without padding.
template <bool kManyRegisters, typename V, int kSplit>
BDP_INLINE void gram_blocks(const GramTask<V, kSplit>& task) {
  constexpr int kWide = kManyRegisters ? 4 : 2;
  if (task.stride != 9) {
    for (int64_t i = 0; i < task.stride; i += 4) {
      gram_block<4, 4, true>(task, i, i);
      for (int64_t j = i + 4; j < task.stride; j += kWide) gram_block<4, kWide, false>(task, i, j);
    }
  } else if constexpr (kManyRegisters) {
    gram_block<5, 5, true>(task, 0, 0);
    gram_block<5, 4, false>(task, 0, 5);
    gram_block<4, 4, true>(task, 5, 5);
  } else {
    for (int64_t i = 0; i < 9; i += 3) {
      gram_block<3, 3, true>(task, i, i);
      for (int64_t j = i + 3; j < 9; j += 3) gram_block<3, 3, false>(task, i, j);
    }
  }
}

// Destination of the sums of a chunk: first `sums`, in slots, then the Gram matrices; the first eight lanes go to
// `gram`, the next to gram + apart. The sums of the first chunk are stored, those of later chunks are added.
template <typename N>
struct GramSums {
  N* sums;
  double* gram;
  int64_t apart;
  bool first;
};

template <typename D, int kSlot, typename N>
BDP_INLINE void add_sums(const GramSums<N>& to, int64_t stride) {
  constexpr int kCount = sizeof(D) / sizeof(double);
  for (int64_t i = 0; i < stride; ++i) {
    for (int64_t place = i * stride + i; place < (i + 1) * stride; ++place) {
#pragma GCC unroll 4
      for (int lane = 0; lane < kSlot; lane += kCount) {
        double* sum = to.gram + lane / kLanes * to.apart + place * kLanes + lane % kLanes;
        const D more = widen_to(to.sums + place * kSlot + lane, D{});
        store(sum, to.first ? more : load<D>(sum) + more);
      }
    }
  }
}

// Gram matrices of eight filters whose rows hold nine values.
template <typename D, typename T>
BDP_INLINE void row_grams(const Octet<T>& octet, int64_t rows, double* gram) {
  double sums[kLanes][kRowProducts * kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (l == 0 || octet.filter[l] != octet.filter[l - 1]) {
      row_sums<D>(octet.filter[l], rows, octet.factor[l], sums[l]);
    } else {
      std::memcpy(sums[l], sums[l - 1], sizeof(sums[l]));
    }
  }
  to_lanes(sums, gram);
}

// Adds the products of the columns of packed, slots of kSlot numbers, to the Gram matrices.
template <typename V, typename D, int kSlot, bool kManyRegisters, typename N>
BDP_INLINE void gram_update(const N* packed, int64_t rows, int64_t stride, const GramSums<N>& to) {
  constexpr int kSplit = kSlot * sizeof(N) / sizeof(V);
  for (int part = 0; part < kSplit; ++part) {
    const V* start = reinterpret_cast<const V*>(packed) + part;
    gram_blocks<kManyRegisters>(GramTask<V, kSplit>{start, rows, stride, reinterpret_cast<V*>(to.sums) + part});
  }
  add_sums<D, kSlot>(to, stride);
}

// Square roots of the largest eigenvalues of the Gram matrices of kOctets sets of eight, `apart` apart.
template <typename V, int kN>
BDP_INLINE void largest_lanes(v8d* gram, int64_t apart, int64_t stride, int side, double* out) {
  constexpr int kSplit = sizeof(v8d) / sizeof(V), kCount = kLanes / kSplit;
  for (int pair = 0; pair < kOctets * kSplit; pair += 2) {
    Matrices<V, 2> a = {{}, stride, side};
    V trace[2], largest[2];
#pragma GCC unroll 2
    for (int way = 0; way < 2; ++way) {
      a.m[way] = reinterpret_cast<V*>(gram + (pair + way) / kSplit * apart) + (pair + way) % kSplit;
      trace[way] = a.at(way, 0, 0);
      for (int i = 1; i < side; ++i) trace[way] += a.at(way, i, i);
      const V inverse = trace[way] > 0.0 ? 1.0 / trace[way] : trace[way];
      for (int i = 0; i < side; ++i) {
        for (int j = i; j < side; ++j) a.at(way, i, j) *= inverse;
      }
    }
    Tridiagonal<V, 2> t;
    tridiagonalize<kN>(a, t);
    largest_of(t, side, largest);
#pragma GCC unroll 2
    for (int way = 0; way < 2; ++way) {
      const V nan = V{} + std::numeric_limits<double>::quiet_NaN();
      const V root = lane_root(V(largest[way] * trace[way]));
      store(out + (pair + way) * kCount, trace[way] - trace[way] == 0.0 ? root : nan);
    }
  }
}

// One side of length 1: the L2 norm, filter by filter with D's lanes along the filter.
template <typename D, typename T>
BDP_INLINE void vector_norms(const Octet<T>& octet, int64_t length, double* out) {
  constexpr int kCount = sizeof(D) / sizeof(double), kStep = 4 * kCount;
  for (int l = 0; l < kLanes; ++l) {
    const T* x = octet.filter[l];
    const double factor = octet.factor[l];
    D sums[4] = {};
    int64_t i = 0;
    for (; i + kStep <= length; i += kStep) {
      Number<T> wide[kStep];
      if constexpr (std::is_same_v<T, double>) {
        std::memcpy(wide, x + i, sizeof(wide));
      } else {
        for (int k = 0; k < kStep; k += 8) store(wide + k, load_float(x + i + k));
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const D u = widen_to(wide + k * kCount, D{}) * factor;
        sums[k] += u * u;
      }
    }
    double sum = 0.0;
    for (; i < length; ++i) {
      const double u = static_cast<double>(widen(x[i])) * factor;
      sum += u * u;
    }
    const D total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int k = 0; k < kCount; ++k) sum += total[k];
    out[l] = sum - sum == 0.0 ? __builtin_sqrt(sum) : std::numeric_limits<double>::quiet_NaN();
  }
}

// Both sides above kLaneSideMax: one filter at a time, rank-1 updates of the upper triangle, then tridiagonal.h.
template <typename T>
double large_norm(const FilterBank& bank, const T* filter, double factor, double* scratch) {
  const int64_t n = bank.side(), length = bank.length();
  const int64_t step = bank.cols <= bank.rows ? 1 : bank.cols, next = bank.cols <= bank.rows ? bank.cols : 1;
  double *gram = scratch, *x = scratch + n * n;
  std::memset(gram, 0, static_cast<size_t>(n * n) * sizeof(double));
  for (int64_t c = 0; c < length; ++c) {
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<double>(widen(filter[c * next + i * step])) * factor;
    for (int64_t i = 0; i < n; ++i) {
      double* row = gram + i * n;
      for (int64_t j = i; j < n; ++j) row[j] += x[i] * x[j];
    }
  }
  double trace = 0.0;
  for (int64_t i = 0; i < n; ++i) trace += gram[i * n + i];
  if (trace == 0.0) return 0.0;
  if (!(trace - trace == 0.0)) return std::numeric_limits<double>::quiet_NaN();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) gram[i * n + j] = gram[j * n + i] = gram[i * n + j] / trace;
  }
  return std::sqrt(largest_eigenvalue(gram, n, x) * trace);
}

// 2^-e with 2^e <= max |x| < 2^(e + 1), limited to the range of N; 1 if there is nothing to scale.
template <typename T>
double scale_factor(const T* x, int64_t count) {
  constexpr int kMost = std::numeric_limits<Number<T>>::max_exponent - 2;
  double largest = 0.0;
  for (int64_t i = 0; i < count; ++i) largest = std::max<double>(largest, std::fabs(widen(x[i])));
  if (largest == 0.0 || !std::isfinite(largest)) return 1.0;
  return std::ldexp(1.0, std::clamp(-std::ilogb(largest), -kMost, kMost));
}

// The functions compiled for each instruction set: few and large; only the first four depend on the type.
template <typename T>
struct TypedKernels {
  void (*pack)(const Octet<T>& octet, int64_t offset, int64_t count, int64_t width, int64_t stride, Lanes<T>* packed);
  void (*pack_scaled)(const Octet<T>& octet, int64_t offset, int64_t count, int64_t width, int64_t stride,
                      Lanes<T>* packed);
  void (*vector_norms)(const Octet<T>& octet, int64_t length, double* out);
  void (*row_grams)(const Octet<T>& octet, int64_t rows, double* gram);  // null if not used
};

template <typename N>
struct GramKernels {
  int abreast;  // octets packed next to each other, to fill a register
  void (*update)(const N* packed, int64_t rows, int64_t stride, const GramSums<N>& to);
};

struct Kernels {
  std::tuple<TypedKernels<float>, TypedKernels<double>, TypedKernels<Half>, TypedKernels<BFloat16>> typed;
  std::tuple<GramKernels<float>, GramKernels<double>> gram;
  void (*largest)(v8d* gram, int64_t apart, int64_t stride, int side, double* out);
  void (*largest_9)(v8d* gram, int64_t apart, int64_t stride, int side, double* out);
};

#define BDP_SPECTRAL_KERNELS(name, target, singles, doubles, many)                                             \
  namespace name {                                                                                             \
  constexpr int kAbreast = sizeof(singles) > sizeof(v8f) ? 2 : 1;                                              \
  template <bool kScaled, typename T>                                                                          \
  target void pack_lanes(const Octet<T>& octet, int64_t offset, int64_t count, int64_t width, int64_t stride,  \
                         Lanes<T>* packed) {                                                                   \
    constexpr int kBeside = std::is_same_v<T, double> ? 1 : kAbreast;                                          \
    pack<singles, kBeside, kScaled>(octet, offset, count, width, stride, packed);                              \
  }                                                                                                            \
  template <typename T>                                                                                        \
  target void norms(const Octet<T>& octet, int64_t length, double* out) {                                      \
    vector_norms<doubles>(octet, length, out);                                                                 \
  }                                                                                                            \
  template <typename T>                                                                                        \
  constexpr bool kByRows = sizeof(singles) >= sizeof(v8f) && !std::is_same_v<T, double>;                       \
  template <typename T>                                                                                        \
  target void grams(const Octet<T>& octet, int64_t rows, double* gram) {                                       \
    if constexpr (kByRows<T>) row_grams<doubles>(octet, rows, gram);                                           \
  }                                                                                                            \
  target void update(const float* packed, int64_t rows, int64_t stride, const GramSums<float>& to) {           \
    gram_update<singles, doubles, kAbreast * kLanes, many>(packed, rows, stride, to);                          \
  }                                                                                                            \
  target void update(const double* packed, int64_t rows, int64_t stride, const GramSums<double>& to) {         \
    gram_update<doubles, doubles, kLanes, many>(packed, rows, stride, to);                                     \
  }                                                                                                            \
  target void largest(v8d* gram, int64_t apart, int64_t stride, int side, double* out) {                       \
    largest_lanes<doubles, 0>(gram, apart, stride, side, out);                                                 \
  }                                                                                                            \
  target void largest_9(v8d* gram, int64_t apart, int64_t, int, double* out) {                                 \
    largest_lanes<doubles, 9>(gram, apart, 9, 9, out);                                                         \
  }                                                                                                            \
  template <typename T>                                                                                        \
  constexpr TypedKernels<T> kTyped = {pack_lanes<std::is_same_v<T, double>, T>, pack_lanes<true, T>, norms<T>, \
                                      kByRows<T> ? grams<T> : nullptr};                                        \
  constexpr Kernels kKernels = {{kTyped<float>, kTyped<double>, kTyped<Half>, kTyped<BFloat16>},               \
                                {GramKernels<float>{kAbreast, update}, GramKernels<double>{1, update}},        \
                                largest,                                                                       \
                                largest_9};                                                                    \
  }

BDP_SPECTRAL_KERNELS(baseline, , v4f, v2d, false)
#if BDP_X86
BDP_SPECTRAL_KERNELS(avx2, BDP_TARGET_AVX2, v8f, v4d, false)
BDP_SPECTRAL_KERNELS(avx512, BDP_TARGET_AVX512, v16f, v8d, true)
#endif

const Kernels& kernels() {
#if BDP_X86
  if (isa() == Isa::kAvx512) return avx512::kKernels;
  if (isa() == Isa::kAvx2) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

// Bytes of a slot of packed lanes.
int64_t slot_bytes(Dtype dtype) {
  if (dtype == Dtype::kDouble) return sizeof(v8d);
  return std::get<GramKernels<float>>(kernels().gram).abreast * static_cast<int64_t>(sizeof(v8f));
}

template <typename T>
void accumulate_gram(const FilterBank& bank, const Octet<T> (&octets)[kOctets], bool scaled, double* scratch) {
  const int64_t side = bank.side(), length = bank.length(), stride = padded(side), apart = stride * stride * kLanes;
  const TypedKernels<T>& typed = std::get<TypedKernels<T>>(kernels().typed);
  // With fewer rows, moving a filter's sums into lanes takes as long as packing its values.
  if (typed.row_grams && bank.cols == 9 && bank.rows >= kRunRows) {
    for (int o = 0; o < kOctets; ++o) typed.row_grams(octets[o], length, scratch + o * apart);
    return;
  }
  const int64_t chunk = chunk_length(side, slot_bytes(bank.dtype));
  Number<T>* sums = reinterpret_cast<Number<T>*>(scratch + kOctets * apart);
  Number<T>* packed_start = sums + stride * stride * slot_bytes(bank.dtype) / int64_t(sizeof(Number<T>));
  // No other code writes the padding of the packed rows.
  if (stride != side) std::memset(packed_start, 0, static_cast<size_t>(stride * chunk * slot_bytes(bank.dtype)));
  const GramKernels<Number<T>>& gram = std::get<GramKernels<Number<T>>>(kernels().gram);
  const auto pack = scaled ? typed.pack_scaled : typed.pack;
  for (int o = 0; o < kOctets; o += gram.abreast) {
    for (int64_t start = 0; start < length; start += chunk) {
      const int64_t rows = std::min(chunk, length - start);
      for (int k = 0; k < gram.abreast; ++k) {
        Lanes<T>* packed = reinterpret_cast<Lanes<T>*>(packed_start) + k;
        if (bank.cols <= bank.rows) {
          pack(octets[o + k], start * side, rows * side, side, stride, packed);
        } else {
          for (int64_t i = 0; i < side; ++i)
            pack(octets[o + k], i * length + start, rows, 1, stride, packed + i * gram.abreast);
        }
      }
      gram.update(packed_start, rows, stride, {sums, scratch + o * apart, apart, start == 0});
    }
  }
}

// Sets the factors of the filters whose float sums may have overflowed or lost digits below the smallest float. Returns
// whether there are any.
template <typename T>
bool set_factors(const FilterBank& bank, const double* gram, Octet<T> (&octets)[kOctets]) {
  const int64_t side = bank.side(), stride = padded(side);
  bool any = false;
  for (int i = 0; i < kBatch; ++i) {
    const double* m = gram + i / kLanes * stride * stride * kLanes + i % kLanes;
    double trace = 0.0;
    for (int64_t k = 0; k < side; ++k) trace += m[k * (stride + 1) * kLanes];
    if (trace >= 0x1p-60 && trace <= 0x1p120) continue;
    Octet<T>& octet = octets[i / kLanes];
    octet.factor[i % kLanes] = scale_factor(octet.filter[i % kLanes], bank.rows * bank.cols);
    any = any || octet.factor[i % kLanes] != 1.0;
  }
  return any;
}

template <typename T>
void gram_norms(const FilterBank& bank, Octet<T> (&octets)[kOctets], double* scratch, double* out) {
  accumulate_gram(bank, octets, false, scratch);
  if constexpr (!std::is_same_v<T, double>) {
    if (set_factors(bank, scratch, octets)) accumulate_gram(bank, octets, true, scratch);
  }
  const int n = static_cast<int>(bank.side());
  const int64_t stride = padded(n);
  (n == 9 ? kernels().largest_9 : kernels().largest)(reinterpret_cast<v8d*>(scratch), stride * stride, stride, n, out);
}

template <typename T>
void norms_of(const FilterBank& bank, int64_t batch, double* scratch, double* out) {
  const int64_t size = bank.rows * bank.cols, first = batch * kBatch;
  if (size == 0) return static_cast<void>(std::fill_n(out, kBatch, 0.0));
  Octet<T> octets[kOctets];
  for (int i = 0; i < kBatch; ++i) {
    Octet<T>& octet = octets[i / kLanes];
    const T* filter = static_cast<const T*>(bank.data) + std::min(first + i, bank.count - 1) * size;
    octet.filter[i % kLanes] = filter;
    octet.factor[i % kLanes] = 1.0;
    if constexpr (std::is_same_v<T, double>) octet.factor[i % kLanes] = scale_factor(filter, size);
  }
  if (bank.side() == 1) {
    for (int o = 0; o < kOctets; ++o)
      std::get<TypedKernels<T>>(kernels().typed).vector_norms(octets[o], bank.length(), out + o * kLanes);
  } else if (bank.side() <= kLaneSideMax) {
    gram_norms(bank, octets, scratch, out);
  } else {
    for (int64_t i = 0; i < std::min<int64_t>(kBatch, bank.count - first); ++i)
      out[i] = large_norm(bank, octets[i / kLanes].filter[i % kLanes], octets[i / kLanes].factor[i % kLanes], scratch);
  }
  for (int i = 0; i < kBatch; ++i) out[i] /= octets[i / kLanes].factor[i % kLanes];
}

}  // namespace

int64_t FilterBank::batch_cost() const {
  const int64_t n = side();
  if (n <= 1) return kBatch * std::max<int64_t>(1, length());
  // 4/3 n^3 multiply-adds, each waiting for the previous one and for divisions, take three times as long as those of
  // the Gram matrix.
  const int64_t eigen = 4 * n * n * n;
  return kBatch * (n * (n + 1) / 2 * length() + eigen);
}

int64_t spectral_scratch(const FilterBank& bank) {
  const int64_t n = bank.side();
  if (n <= 1) return 0;
  if (n > kLaneSideMax) return n * n + 3 * n;
  const int64_t slot = slot_bytes(bank.dtype), doubles = static_cast<int64_t>(sizeof(double));
  return padded(n) * (kOctets * kLanes * padded(n) + (padded(n) + chunk_length(n, slot)) * slot / doubles);
}

void spectral_norms(const FilterBank& bank, int64_t batch, double* scratch, double* out) {
  switch (bank.dtype) {
    case Dtype::kFloat:
      return norms_of<float>(bank, batch, scratch, out);
    case Dtype::kDouble:
      return norms_of<double>(bank, batch, scratch, out);
    case Dtype::kHalf:
      return norms_of<Half>(bank, batch, scratch, out);
    case Dtype::kBFloat16:
      return norms_of<BFloat16>(bank, batch, scratch, out);
  }
}

}  // namespace bdprune::core
