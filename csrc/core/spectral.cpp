#include "spectral.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"
#include "jacobi.h"
#include "tridiagonal.h"

namespace bdprune::core {
namespace {

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
BDP_INLINE void load_eight(const Octet<T>& octet, int64_t offset, v8d (&out)[8]) {
  v8f r[8];
#pragma GCC unroll 8
  for (int l = 0; l < kLanes; ++l) r[l] = load_float(octet.filter[l] + offset);
  transpose(r);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) out[i] = __builtin_convertvector(r[i], v8d);
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

// Transposes the run [offset, offset + count) of the eight filters into lanes: element i goes to row i / width, column
// i % width of `packed`, whose rows are `stride` lanes apart.
template <typename T>
BDP_INLINE void pack(const Octet<T>& octet, int64_t offset, int64_t count, int64_t width, int64_t stride, v8d* packed) {
  int64_t column = 0;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    v8d eight[8];
    load_eight(octet, offset + i, eight);
    if (width == stride) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) packed[k] = eight[k];
      packed += 8;
      continue;
    }
    for (int k = 0; k < 8; ++k) {
      packed[column] = eight[k];
      if (++column == width) packed += stride, column = 0;
    }
  }
  for (; i < count; ++i) {
    packed[column] = load_one(octet, offset + i);
    if (++column == width) packed += stride, column = 0;
  }
}

// gram[i0.., j0..] += sum over the rows of packed of its columns i0.. times its columns j0.., R x C accumulators in
// registers. With kUpper only the upper triangle.
template <int R, int C, bool kUpper>
BDP_INLINE void gram_block(const v8d* packed, int64_t rows, int64_t stride, v8d* gram, int64_t i0, int64_t j0) {
  v8d acc[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = kUpper ? i : 0; j < C; ++j) acc[i][j] = gram[(i0 + i) * stride + j0 + j];
  }
  for (int64_t row = 0; row < rows; ++row, packed += stride) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const v8d left = packed[i0 + i];
#pragma GCC unroll 8
      for (int j = kUpper ? i : 0; j < C; ++j) acc[i][j] += left * packed[j0 + j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = kUpper ? i : 0; j < C; ++j) gram[(i0 + i) * stride + j0 + j] = acc[i][j];
  }
}

// Blocks of kBlock x kBlock, as many accumulators as the registers of the instruction set hold. 3x3 kernels, which are
// nearly all there is, have their own split of 9 = 5 + 4 without padding.
template <int kBlock>
BDP_INLINE void gram_update(const v8d* packed, int64_t rows, int64_t stride, v8d* gram) {
  if (stride == 9) {
    if constexpr (kBlock == 4) {
      gram_block<5, 5, true>(packed, rows, 9, gram, 0, 0);
      gram_block<5, 4, false>(packed, rows, 9, gram, 0, 5);
      gram_block<4, 4, true>(packed, rows, 9, gram, 5, 5);
    } else {
      for (int64_t i = 0; i < 9; i += 3) {
        gram_block<3, 3, true>(packed, rows, 9, gram, i, i);
        for (int64_t j = i + 3; j < 9; j += 3) gram_block<3, 3, false>(packed, rows, 9, gram, i, j);
      }
    }
    return;
  }
  for (int64_t i = 0; i < stride; i += kBlock) {
    gram_block<kBlock, kBlock, true>(packed, rows, stride, gram, i, i);
    for (int64_t j = i + kBlock; j < stride; j += kBlock)
      gram_block<kBlock, kBlock, false>(packed, rows, stride, gram, i, j);
  }
}

struct LaneRotation {
  v8d c, s;
};

// The rotations of eight matrices. The angle is found in float32, where the division and the roots are cheap: an angle
// that is off by 1e-7 leaves 1e-7 of the element, which the next sweep takes. What must be exact is c^2 + s^2 = 1, so c
// is polished to float64 by two Newton steps. The matrices have trace 1; elements below 1e-18 of it can be left as they
// are, which is what the 1e-36 under the root does, apart from keeping 0/0 away.
BDP_INLINE LaneRotation lane_rotation(const v8d& app, const v8d& aqq, const v8d& apq) {
  const v8f d = __builtin_convertvector(0.5 * (aqq - app), v8f);
  const v8f p = __builtin_convertvector(apq, v8f);
  const v8u sign = (v8u)d & 0x80000000u;
  v8f h = d * d + p * p + 1e-36f;
  for (int l = 0; l < kLanes; ++l) h[l] = __builtin_sqrtf(h[l]);
  const v8f t32 = (v8f)((v8u)p ^ sign) / ((v8f)((v8u)d & 0x7fffffffu) + h);
  v8f root = t32 * t32 + 1.0f;
  for (int l = 0; l < kLanes; ++l) root[l] = __builtin_sqrtf(root[l]);
  const v8d t = __builtin_convertvector(t32, v8d);
  const v8d half = 0.5 * (t * t + 1.0);
  v8d c = __builtin_convertvector(1.0f / root, v8d);
  c *= 1.5 - half * c * c;
  c *= 1.5 - half * c * c;
  return {c, t * c};
}

// kSide > 0 fixes the size at compile time.
template <int kSide>
BDP_INLINE void jacobi_lanes(v8d* gram, int64_t stride, int side) {
  const int n = kSide > 0 ? kSide : side;
  LaneRotation rotation[kJacobiMax / 2];
  Pair pair[kJacobiMax / 2];
  const auto at = [&](int i, int j)
                      __attribute__((always_inline)) -> v8d& { return gram[i < j ? i * stride + j : j * stride + i]; };
  for (int sweep = 0; sweep < jacobi_sweeps(n); ++sweep) {
    for (int step = 0; step < jacobi_steps(n); ++step) {
      const int pairs = jacobi_pairs(n);
      for (int i = 0; i < pairs; ++i) {
        pair[i] = jacobi_pair(n, step, i);
        v8d &app = at(pair[i].p, pair[i].p), &aqq = at(pair[i].q, pair[i].q), &apq = at(pair[i].p, pair[i].q);
        rotation[i] = lane_rotation(app, aqq, apq);
        const v8d c = rotation[i].c, s = rotation[i].s;
        const v8d cc = c * c, ss = s * s, cs = c * s, cross = 2.0 * cs * apq;
        const v8d p = cc * app - cross + ss * aqq, q = ss * app + cross + cc * aqq;
        apq = cs * (app - aqq) + (cc - ss) * apq;
        app = p;
        aqq = q;
      }
      // The rows of one pair meet the columns of another in 2 x 2 blocks, which are rotated from both sides at once.
      for (int i = 0; i < pairs; ++i) {
        const v8d ci = rotation[i].c, si = rotation[i].s;
        for (int j = i + 1; j < pairs; ++j) {
          const v8d cj = rotation[j].c, sj = rotation[j].s;
          v8d &pp = at(pair[i].p, pair[j].p), &pq = at(pair[i].p, pair[j].q);
          v8d &qp = at(pair[i].q, pair[j].p), &qq = at(pair[i].q, pair[j].q);
          const v8d a = ci * pp - si * qp, b = ci * pq - si * qq, c = si * pp + ci * qp, d = si * pq + ci * qq;
          pp = cj * a - sj * b;
          pq = sj * a + cj * b;
          qp = cj * c - sj * d;
          qq = sj * c + cj * d;
        }
        if (n % 2 == 1) {  // the index that sits this step out
          v8d &kp = at(step, pair[i].p), &kq = at(step, pair[i].q);
          const v8d a = ci * kp - si * kq;
          kq = si * kp + ci * kq;
          kp = a;
        }
      }
    }
  }
}

BDP_INLINE v8d max_lanes(const v8d& a, const v8d& b) { return a > b ? a : b; }

// Square roots of the largest eigenvalues of the eight Gram matrices.
template <int kSide>
BDP_INLINE v8d largest_lanes(v8d* gram, int64_t stride, int side) {
  v8d trace = gram[0];
  for (int i = 1; i < side; ++i) trace += gram[i * stride + i];
  const v8d inverse = trace > 0.0 ? 1.0 / trace : trace;
  for (int i = 0; i < side; ++i) {
    for (int j = i; j < side; ++j) gram[i * stride + j] *= inverse;
  }
  jacobi_lanes<kSide>(gram, stride, side);
  v8d largest = gram[0];
  for (int i = 1; i < side; ++i) largest = max_lanes(largest, gram[i * stride + i]);
  largest *= trace;
  for (int l = 0; l < kLanes; ++l) largest[l] = __builtin_sqrt(largest[l]);
  const v8d nan = v8d{} + std::numeric_limits<double>::quiet_NaN();
  return trace - trace == 0.0 ? largest : nan;
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

template <int kBlock, typename T>
BDP_INLINE v8d gram_norms(const FilterBank& bank, const Octet<T>& octet, double* scratch) {
  const int64_t side = bank.side(), length = bank.length(), stride = padded(side), chunk = chunk_length(side);
  v8d* gram = reinterpret_cast<v8d*>(scratch);
  v8d* packed = gram + stride * stride;
  std::memset(scratch, 0, static_cast<size_t>(stride * (stride + chunk)) * sizeof(v8d));
  for (int64_t start = 0; start < length; start += chunk) {
    const int64_t rows = std::min(chunk, length - start);
    if (bank.cols <= bank.rows) {
      pack(octet, start * side, rows * side, side, stride, packed);
    } else {
      for (int64_t i = 0; i < side; ++i) pack(octet, i * length + start, rows, 1, stride, packed + i);
    }
    gram_update<kBlock>(packed, rows, stride, gram);
  }
  const int n = static_cast<int>(side);
  return n == 9 ? largest_lanes<9>(gram, 9, 9) : largest_lanes<0>(gram, stride, n);
}

// Both sides above kJacobiMax: one filter at a time, rank-1 updates of the upper triangle, then tridiagonal.h.
template <typename T>
BDP_INLINE double large_norm(const FilterBank& bank, const T* filter, double factor, double* scratch) {
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

template <int kBlock, typename T>
BDP_INLINE void norms_of(const FilterBank& bank, int64_t batch, double* scratch, double* out) {
  const int64_t size = bank.rows * bank.cols, first = batch * kLanes;
  Octet<T> octet;
  for (int l = 0; l < kLanes; ++l) {
    octet.filter[l] = static_cast<const T*>(bank.data) + std::min(first + l, bank.count - 1) * size;
    octet.factor[l] = 1.0;
    if constexpr (std::is_same_v<T, double>) octet.factor[l] = scale_factor(octet.filter[l], size);
  }
  v8d norms = {};
  if (size == 0) {
    norms = v8d{};
  } else if (bank.side() == 1) {
    norms = vector_norms(octet, bank.length());
  } else if (bank.side() <= kJacobiMax) {
    norms = gram_norms<kBlock>(bank, octet, scratch);
  } else {
    for (int64_t l = 0; l < std::min<int64_t>(kLanes, bank.count - first); ++l)
      norms[l] = large_norm(bank, octet.filter[l], octet.factor[l], scratch);
  }
  for (int l = 0; l < kLanes; ++l) out[l] = norms[l] / octet.factor[l];
}

template <int kBlock>
BDP_INLINE void norms_of_any(const FilterBank& bank, int64_t batch, double* scratch, double* out) {
  switch (bank.dtype) {
    case Dtype::kFloat:
      return norms_of<kBlock, float>(bank, batch, scratch, out);
    case Dtype::kDouble:
      return norms_of<kBlock, double>(bank, batch, scratch, out);
    case Dtype::kHalf:
      return norms_of<kBlock, Half>(bank, batch, scratch, out);
    case Dtype::kBFloat16:
      return norms_of<kBlock, BFloat16>(bank, batch, scratch, out);
  }
}

#if BDP_X86
BDP_TARGET_AVX512 void norms_avx512(const FilterBank& bank, int64_t batch, double* scratch, double* out) {
  norms_of_any<4>(bank, batch, scratch, out);
}
BDP_TARGET_AVX2 void norms_avx2(const FilterBank& bank, int64_t batch, double* scratch, double* out) {
  norms_of_any<2>(bank, batch, scratch, out);
}
#endif
void norms_baseline(const FilterBank& bank, int64_t batch, double* scratch, double* out) {
  norms_of_any<2>(bank, batch, scratch, out);
}

}  // namespace

int64_t FilterBank::batch_cost() const {
  const int64_t n = side();
  if (n <= 1) return kLanes * std::max<int64_t>(1, length());
  // A rotation of a row costs about four multiply-adds, and a sweep has n^2 / 2 rotations of n rows.
  const int64_t eigen = n <= kJacobiMax ? 2 * n * n * n * jacobi_sweeps(static_cast<int>(n)) : 2 * n * n * n;
  return kLanes * (n * (n + 1) / 2 * length() + eigen);
}

int64_t spectral_scratch(const FilterBank& bank) {
  const int64_t n = bank.side();
  if (n <= 1) return 0;
  if (n > kJacobiMax) return n * n + 3 * n;
  return kLanes * padded(n) * (padded(n) + chunk_length(n));
}

void spectral_norms(const FilterBank& bank, int64_t batch, double* scratch, double* out) {
#if BDP_X86
  if (isa() == Isa::kAvx512) return norms_avx512(bank, batch, scratch, out);
  if (isa() == Isa::kAvx2) return norms_avx2(bank, batch, scratch, out);
#endif
  norms_baseline(bank, batch, scratch, out);
}

}  // namespace bdprune::core
