#include "spectral.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "isa.h"
#include "jacobi.h"
#include "tridiagonal.h"

namespace bdprune::core {
namespace {

constexpr int kOctets = kBatch / kLanes;

// Elements that a stream of a filter is fetched ahead.
constexpr int64_t kPrefetch = 256;

// Packed elements are kept within half of a 48 KiB first-level cache.
constexpr int64_t kPackedLanes = 512;

int64_t padded(int64_t side) { return side == 9 ? 9 : (side + 3) / 4 * 4; }

// Positions along the long side that are packed at a time: a multiple of 8, so that runs have no tail before the last.
int64_t chunk_length(int64_t side) { return std::max<int64_t>(8, kPackedLanes / padded(side) / 8 * 8); }

// Eight filters of one bank, one per lane. Lanes beyond the last filter repeat it.
template <typename T>
struct Octet {
  const T* filter[kLanes];
  v8d factor;  // power of two that brings a float64 filter to a maximum near 1; 1 for the other types
};

template <typename T>
BDP_INLINE void load_eight(const Octet<T>& octet, int64_t offset, v8f (&out)[8]) {
  // Joining the halves of filters l and l + 4 while loading saves the last of the three rounds of a transpose.
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

BDP_INLINE void load_eight(const Octet<double>& octet, int64_t offset, v8d (&out)[8]) {
  for (int i = 0; i < 8; ++i) {
    for (int l = 0; l < kLanes; ++l) out[i][l] = octet.filter[l][offset + i];
    out[i] *= octet.factor;
  }
}

template <typename T>
BDP_INLINE v8d load_one(const Octet<T>& octet, int64_t offset) {
  v8d out;
  for (int l = 0; l < kLanes; ++l) out[l] = widen(octet.filter[l][offset]);
  return out * octet.factor;
}

// Writes eight lanes as float64, in registers of V (GCC spills what is wider).
template <typename V>
BDP_INLINE void put(v8d* to, const v8f& x) {
  if constexpr (sizeof(V) == sizeof(v8d)) {
    *to = __builtin_convertvector(x, v8d);
  } else {
    store(to, __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3), v4d));
    store(reinterpret_cast<v4d*>(to) + 1, __builtin_convertvector(__builtin_shufflevector(x, x, 4, 5, 6, 7), v4d));
  }
}
template <typename V>
BDP_INLINE void put(v8d* to, const v8d& x) {
  *to = x;
}

// Transposes the run [offset, offset + count) of the eight filters into lanes: element i goes to row i / width, column
// i % width of `packed`, whose rows are `stride` lanes apart.
template <typename V, typename T>
BDP_INLINE void pack(const Octet<T>& octet, int64_t offset, int64_t count, int64_t width, int64_t stride, v8d* packed) {
  int64_t column = 0;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    // Eight streams are more than the hardware follows well: the cold run of a 512-channel layer gains 13 %.
    if (i % 16 == 0) {
      for (int l = 0; l < kLanes; ++l) __builtin_prefetch(octet.filter[l] + offset + i + kPrefetch);
    }
    std::conditional_t<std::is_same_v<T, double>, v8d, v8f> eight[8];
    load_eight(octet, offset + i, eight);
    if (width == stride) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) put<V>(packed + k, eight[k]);
      packed += 8;
      continue;
    }
    for (int k = 0; k < 8; ++k) {
      put<V>(packed + column, eight[k]);
      if (++column == width) packed += stride, column = 0;
    }
  }
  for (; i < count; ++i) {
    packed[column] = load_one(octet, offset + i);
    if (++column == width) packed += stride, column = 0;
  }
}

// gram[i0.., j0..] += sum over the rows of packed of its columns i0.. times its columns j0.., R x C accumulators in
// registers. With kUpper only the upper triangle. V is a register of the instruction set: the eight lanes of a
// column are kSplit registers, of which a call takes one, since GCC spills what is wider than a register.
template <typename V, int R, int C, bool kUpper>
BDP_INLINE void gram_block(const V* packed, int64_t rows, int64_t stride, V* gram, int64_t i0, int64_t j0) {
  constexpr int64_t kSplit = sizeof(v8d) / sizeof(V);
  V acc[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = kUpper ? i : 0; j < C; ++j) acc[i][j] = gram[((i0 + i) * stride + j0 + j) * kSplit];
  }
  for (int64_t row = 0; row < rows; ++row, packed += stride * kSplit) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V left = packed[(i0 + i) * kSplit];
#pragma GCC unroll 8
      for (int j = kUpper ? i : 0; j < C; ++j) acc[i][j] += left * packed[(j0 + j) * kSplit];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = kUpper ? i : 0; j < C; ++j) gram[((i0 + i) * stride + j0 + j) * kSplit] = acc[i][j];
  }
}

// Square blocks, as many accumulators as the registers hold: 16 of the 32 of AVX-512, 9 of the 16 of the others. 3x3
// kernels, which are nearly all there is, have their own splits of 9 without padding.
template <typename V>
BDP_INLINE void gram_update(const v8d* packed_lanes, int64_t rows, int64_t stride, v8d* gram_lanes) {
  constexpr int kBlock = sizeof(V) == sizeof(v8d) ? 4 : 2;
  for (size_t part = 0; part < sizeof(v8d) / sizeof(V); ++part) {
    const V* packed = reinterpret_cast<const V*>(packed_lanes) + part;
    V* gram = reinterpret_cast<V*>(gram_lanes) + part;
    if (stride != 9) {
      for (int64_t i = 0; i < stride; i += kBlock) {
        gram_block<V, kBlock, kBlock, true>(packed, rows, stride, gram, i, i);
        for (int64_t j = i + kBlock; j < stride; j += kBlock)
          gram_block<V, kBlock, kBlock, false>(packed, rows, stride, gram, i, j);
      }
    } else if constexpr (kBlock == 4) {
      gram_block<V, 5, 5, true>(packed, rows, 9, gram, 0, 0);
      gram_block<V, 5, 4, false>(packed, rows, 9, gram, 0, 5);
      gram_block<V, 4, 4, true>(packed, rows, 9, gram, 5, 5);
    } else {
      for (int64_t i = 0; i < 9; i += 3) {
        gram_block<V, 3, 3, true>(packed, rows, 9, gram, i, i);
        for (int64_t j = i + 3; j < 9; j += 3) gram_block<V, 3, 3, false>(packed, rows, 9, gram, i, j);
      }
    }
  }
}

template <typename V>
struct LaneRotation {
  V c, s;
};

// 1 / sqrt(1 + x) for x in [0, 1] to the last bits of float64: a minimax polynomial (relative error 1.2e-5), then one
// step of the fourth-order Householder iteration. Shorter and more parallel than a root and a division.
template <typename V>
BDP_INLINE V inverse_root_1p(const V& x) {
  const V x2 = x * x;
  const V low = 0.9999883537128792 - 0.4991064440349353 * x;
  const V middle = 0.3635163476081221 - 0.25533391337549827 * x;
  const V high = 0.12943810211303897 - 0.03140389994684842 * x;
  const V y = low + x2 * (middle + x2 * high);
  const V residual = 1.0 - (x * (y * y) + y * y);
  return y + y * residual * (0.5 + residual * (0.375 + residual * 0.3125));
}

// The rotations of eight matrices. The angle is found in float32, where the division and the root are cheap: an angle
// that is off by 1e-7 leaves 1e-7 of the element, which the next sweep takes. What must be exact is c^2 + s^2 = 1. The
// matrices have trace 1; elements below 1e-18 of it can be left as they are, which is what the 1e-36 under the root
// does, apart from keeping 0/0 away.
template <typename V>
BDP_INLINE LaneRotation<V> lane_rotation(const V& app, const V& aqq, const V& apq) {
  constexpr int kCount = sizeof(V) / sizeof(double);
  using F = typename Register<float, kCount * sizeof(float)>::type;
  using U = typename Register<uint32_t, kCount * sizeof(uint32_t)>::type;
  const F d = __builtin_convertvector(0.5 * (aqq - app), F);
  const F p = __builtin_convertvector(apq, F);
  const U sign = (U)d & 0x80000000u;
  F h = d * d + (p * p + 1e-36f);
  for (int l = 0; l < kCount; ++l) h[l] = __builtin_sqrtf(h[l]);
  const F t32 = (F)((U)p ^ sign) / ((F)((U)d & 0x7fffffffu) + h);
  const V t = __builtin_convertvector(t32, V);
  const V c = inverse_root_1p(t * t);
  return {c, t * c};
}

// The pairs of one step; a table at compile time when the size is fixed.
struct Step {
  Pair pair[kJacobiMax / 2];
};

BDP_INLINE constexpr Step make_step(int n, int step) {
  Step result = {};
  for (int i = 0; i < jacobi_pairs(n); ++i) result.pair[i] = jacobi_pair(n, step, i);
  return result;
}

// Element (i, j) of the upper triangle, in registers of V (see gram_block).
template <typename V>
BDP_INLINE V& element(V* gram, int64_t stride, int i, int j) {
  constexpr int64_t kSplit = sizeof(v8d) / sizeof(V);
  return gram[(i < j ? i * stride + j : j * stride + i) * kSplit];
}

// Finds the rotation of a pair and applies it to the pair's own 2 x 2 block.
template <typename V>
BDP_INLINE LaneRotation<V> rotate_pair(V* m, int64_t stride, const Pair& pair) {
  V &app = element(m, stride, pair.p, pair.p), &aqq = element(m, stride, pair.q, pair.q);
  V& apq = element(m, stride, pair.p, pair.q);
  const LaneRotation<V> rotation = lane_rotation(app, aqq, apq);
  const V c = rotation.c, s = rotation.s;
  const V cc = c * c, ss = s * s, cs = c * s, cross = 2.0 * cs * apq;
  const V new_p = cc * app - cross + ss * aqq, new_q = ss * app + cross + cc * aqq;
  apq = cs * (app - aqq) + (cc - ss) * apq;
  app = new_p;
  aqq = new_q;
  return rotation;
}

// The 2 x 2 block where the rows of pair i meet the columns of pair j, rotated from both sides at once.
template <typename V>
BDP_INLINE void rotate_block(V* m, int64_t stride, const Pair& i, const Pair& j, const LaneRotation<V>& ri,
                             const LaneRotation<V>& rj) {
  V &pp = element(m, stride, i.p, j.p), &pq = element(m, stride, i.p, j.q);
  V &qp = element(m, stride, i.q, j.p), &qq = element(m, stride, i.q, j.q);
  const V a = ri.c * pp - ri.s * qp, b = ri.c * pq - ri.s * qq;
  const V c = ri.s * pp + ri.c * qp, d = ri.s * pq + ri.c * qq;
  pp = rj.c * a - rj.s * b;
  pq = rj.s * a + rj.c * b;
  qp = rj.c * c - rj.s * d;
  qq = rj.s * c + rj.c * d;
}

// The two elements where a pair meets the index that sits the step out (odd sizes only).
template <typename V>
BDP_INLINE void rotate_idle(V* m, int64_t stride, int idle, const Pair& pair, const LaneRotation<V>& r) {
  V &kp = element(m, stride, idle, pair.p), &kq = element(m, stride, idle, pair.q);
  const V a = r.c * kp - r.s * kq;
  kq = r.s * kp + r.c * kq;
  kp = a;
}

// One step of disjoint rotations on each of kOctets sets of matrices, `apart` registers from one to the next. Finding
// an angle is a long chain of few operations and a small matrix has too few pairs to fill the time, so two sets go side
// by side.
template <int kOctets, typename V>
BDP_INLINE void jacobi_step(V* gram, int64_t apart, int64_t stride, int n, int step) {
  LaneRotation<V> rotation[kOctets][kJacobiMax / 2];
  const Step table = make_step(n, step);
  const Pair* pair = table.pair;
  const int pairs = jacobi_pairs(n);
  for (int o = 0; o < kOctets; ++o) {
    for (int i = 0; i < pairs; ++i) rotation[o][i] = rotate_pair(gram + o * apart, stride, pair[i]);
  }
  for (int o = 0; o < kOctets; ++o) {
    V* m = gram + o * apart;
    for (int i = 0; i < pairs; ++i) {
      for (int j = i + 1; j < pairs; ++j) rotate_block(m, stride, pair[i], pair[j], rotation[o][i], rotation[o][j]);
      if (n % 2 == 1) rotate_idle(m, stride, step, pair[i], rotation[o][i]);
    }
  }
}

// The same with everything unrolled for n = 9, so that all places are known to the compiler.
template <int kOctets, int kStep, typename V>
BDP_INLINE void jacobi_step_9(V* gram, int64_t apart) {
  static constexpr Step kTable = make_step(9, kStep);
  LaneRotation<V> rotation[kOctets][4];
#pragma GCC unroll 2
  for (int o = 0; o < kOctets; ++o) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) rotation[o][i] = rotate_pair(gram + o * apart, 9, kTable.pair[i]);
  }
#pragma GCC unroll 2
  for (int o = 0; o < kOctets; ++o) {
    V* m = gram + o * apart;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int j = i + 1; j < 4; ++j)
        rotate_block(m, 9, kTable.pair[i], kTable.pair[j], rotation[o][i], rotation[o][j]);
      rotate_idle(m, 9, kStep, kTable.pair[i], rotation[o][i]);
    }
  }
}

template <int kOctets, typename V, int... kSteps>
BDP_INLINE void jacobi_sweep_9(V* gram, int64_t apart, std::integer_sequence<int, kSteps...>) {
  (jacobi_step_9<kOctets, kSteps>(gram, apart), ...);
}

template <int kOctets, bool kUnroll, typename V>
BDP_INLINE void jacobi_lanes(V* gram, int64_t apart, int64_t stride, int n, int sweeps) {
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    if (kUnroll && n == 9) {
      jacobi_sweep_9<kOctets>(gram, apart, std::make_integer_sequence<int, 9>{});
    } else {
      for (int step = 0; step < jacobi_steps(n); ++step) jacobi_step<kOctets>(gram, apart, stride, n, step);
    }
  }
}

BDP_INLINE v8d max_lanes(const v8d& a, const v8d& b) { return a > b ? a : b; }

// Square roots of the largest eigenvalues of kOctets sets of eight Gram matrices.
template <typename V, int kOctets, bool kUnroll>
BDP_INLINE void largest_lanes(v8d* gram, int64_t apart, int64_t stride, int side, int sweeps, double* out) {
  v8d trace[kOctets];
  for (int o = 0; o < kOctets; ++o) {
    v8d* m = gram + o * apart;
    trace[o] = m[0];
    for (int i = 1; i < side; ++i) trace[o] += m[i * stride + i];
    const v8d inverse = trace[o] > 0.0 ? 1.0 / trace[o] : trace[o];
    for (int i = 0; i < side; ++i) {
      for (int j = i; j < side; ++j) m[i * stride + j] *= inverse;
    }
  }
  constexpr int kSplit = sizeof(v8d) / sizeof(V);
  for (int part = 0; part < kSplit; ++part)
    jacobi_lanes<kOctets, kUnroll>(reinterpret_cast<V*>(gram) + part, apart * kSplit, stride, side, sweeps);
  const v8d nan = v8d{} + std::numeric_limits<double>::quiet_NaN();
  for (int o = 0; o < kOctets; ++o) {
    const v8d* m = gram + o * apart;
    v8d largest = m[0];
    for (int i = 1; i < side; ++i) largest = max_lanes(largest, m[i * stride + i]);
    largest *= trace[o];
    for (int l = 0; l < kLanes; ++l) largest[l] = __builtin_sqrt(largest[l]);
    store(out + o * kLanes, trace[o] - trace[o] == 0.0 ? largest : nan);
  }
}

// One side of length 1: the L2 norm, each filter by itself with its lanes along the filter.
template <typename T>
BDP_INLINE v8d vector_norms(const Octet<T>& octet, int64_t length) {
  v8d norms;
  for (int l = 0; l < kLanes; ++l) {
    const T* x = octet.filter[l];
    const double factor = octet.factor[l];
    v8d a = {}, b = {};
    int64_t i = 0;
    for (; i + 16 <= length; i += 16) {
      const v8d u = load_double(x + i) * factor, v = load_double(x + i + 8) * factor;
      a += u * u;
      b += v * v;
    }
    double rest = 0.0;
    for (; i < length; ++i) {
      const double u = static_cast<double>(widen(x[i])) * factor;
      rest += u * u;
    }
    const double sum = sum_lanes(a + b) + rest;
    norms[l] = sum - sum == 0.0 ? __builtin_sqrt(sum) : std::numeric_limits<double>::quiet_NaN();
  }
  return norms;
}

// Both sides above kJacobiMax: one filter at a time, rank-1 updates of the upper triangle, then tridiagonal.h.
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

// 2^-e with 2^e <= max |x| < 2^(e + 1); 1 where there is nothing to scale.
double scale_factor(const double* x, int64_t count) {
  double largest = 0.0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(x[i]));
  if (largest == 0.0 || !std::isfinite(largest)) return 1.0;
  return std::ldexp(1.0, std::clamp(-std::ilogb(largest), -1022, 1022));
}

// What is compiled once per instruction set: few, large functions, of which only the first two depend on the type.
template <typename T>
struct TypedKernels {
  void (*pack)(const Octet<T>& octet, int64_t offset, int64_t count, int64_t width, int64_t stride, v8d* packed);
  void (*vector_norms)(const Octet<T>& octet, int64_t length, double* out);
};

struct Kernels {
  std::tuple<TypedKernels<float>, TypedKernels<double>, TypedKernels<Half>, TypedKernels<BFloat16>> typed;
  void (*gram_update)(const v8d* packed, int64_t rows, int64_t stride, v8d* gram);
  void (*largest)(v8d* gram, int64_t stride, int side, int sweeps, double* out);
  void (*largest_pair)(v8d* gram, int64_t apart, int64_t stride, int side, int sweeps, double* out);
};

#define BDP_SPECTRAL_KERNELS(name, target, vector, eigen, unroll)                                             \
  namespace name {                                                                                            \
  template <typename T>                                                                                       \
  target void pack_lanes(const Octet<T>& octet, int64_t offset, int64_t count, int64_t width, int64_t stride, \
                         v8d* packed) {                                                                       \
    pack<vector>(octet, offset, count, width, stride, packed);                                                \
  }                                                                                                           \
  template <typename T>                                                                                       \
  target void norms(const Octet<T>& octet, int64_t length, double* out) {                                     \
    store(out, vector_norms(octet, length));                                                                  \
  }                                                                                                           \
  target void update(const v8d* packed, int64_t rows, int64_t stride, v8d* gram) {                            \
    gram_update<vector>(packed, rows, stride, gram);                                                          \
  }                                                                                                           \
  target void largest(v8d* gram, int64_t stride, int side, int sweeps, double* out) {                         \
    largest_lanes<eigen, 1, false>(gram, 0, stride, side, sweeps, out);                                       \
  }                                                                                                           \
  target void largest_pair(v8d* gram, int64_t apart, int64_t stride, int side, int sweeps, double* out) {     \
    largest_lanes<eigen, 2, unroll>(gram, apart, stride, side, sweeps, out);                                  \
  }                                                                                                           \
  constexpr Kernels kKernels = {{{pack_lanes<float>, norms<float>},                                           \
                                 {pack_lanes<double>, norms<double>},                                         \
                                 {pack_lanes<Half>, norms<Half>},                                             \
                                 {pack_lanes<BFloat16>, norms<BFloat16>}},                                    \
                                update,                                                                       \
                                largest,                                                                      \
                                largest_pair};                                                                \
  }

BDP_SPECTRAL_KERNELS(baseline, , v2d, v8d, false)
#if BDP_X86
BDP_SPECTRAL_KERNELS(avx2, BDP_TARGET_AVX2, v4d, v4d, true)
BDP_SPECTRAL_KERNELS(avx512, BDP_TARGET_AVX512, v8d, v8d, true)
#endif

const Kernels& kernels() {
#if BDP_X86
  if (isa() == Isa::kAvx512) return avx512::kKernels;
  if (isa() == Isa::kAvx2) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

template <typename T>
void accumulate_gram(const Kernels& kernels, const FilterBank& bank, const Octet<T>& octet, v8d* packed, v8d* gram) {
  const int64_t side = bank.side(), length = bank.length(), stride = padded(side), chunk = chunk_length(side);
  const TypedKernels<T>& typed = std::get<TypedKernels<T>>(kernels.typed);
  for (int64_t start = 0; start < length; start += chunk) {
    const int64_t rows = std::min(chunk, length - start);
    if (bank.cols <= bank.rows) {
      typed.pack(octet, start * side, rows * side, side, stride, packed);
    } else {
      for (int64_t i = 0; i < side; ++i) typed.pack(octet, i * length + start, rows, 1, stride, packed + i);
    }
    kernels.gram_update(packed, rows, stride, gram);
  }
}

template <typename T>
void gram_norms(const FilterBank& bank, const Octet<T> (&octets)[kOctets], double* scratch, double* out) {
  const int n = static_cast<int>(bank.side());
  const int64_t stride = padded(n), apart = stride * stride;
  v8d* gram = reinterpret_cast<v8d*>(scratch);
  v8d* packed = gram + kOctets * apart;
  // The sums start at zero; so does the padding of the packed rows, which nothing else writes.
  const int64_t used = kOctets * apart + (stride == n ? 0 : stride * chunk_length(n));
  std::memset(scratch, 0, static_cast<size_t>(used) * sizeof(v8d));
  for (int o = 0; o < kOctets; ++o) accumulate_gram(kernels(), bank, octets[o], packed, gram + o * apart);
  const int sweeps = jacobi_sweeps(n) + (std::is_same_v<T, double> ? 1 : 0);
  if (n <= 9) return kernels().largest_pair(gram, apart, stride, n, sweeps, out);
  for (int o = 0; o < kOctets; ++o) kernels().largest(gram + o * apart, stride, n, sweeps, out + o * kLanes);
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
  } else if (bank.side() <= kJacobiMax) {
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
  // A rotation of a row costs about four multiply-adds, and a sweep has n^2 / 2 rotations of n rows.
  const int64_t eigen = n <= kJacobiMax ? 2 * n * n * n * jacobi_sweeps(static_cast<int>(n)) : 2 * n * n * n;
  return kBatch * (n * (n + 1) / 2 * length() + eigen);
}

int64_t spectral_scratch(const FilterBank& bank) {
  const int64_t n = bank.side();
  if (n <= 1) return 0;
  if (n > kJacobiMax) return n * n + 3 * n;
  return kLanes * padded(n) * (kOctets * padded(n) + chunk_length(n));
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
