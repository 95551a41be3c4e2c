// Largest eigenvalues of many small symmetric matrices, one matrix per lane: Householder tridiagonalisation, then
// Laguerre's iteration from above.
//
// Only one eigenvalue is needed, so Jacobi's diagonalisation would take ten times the work: tridiagonalisation takes
// 4/3 n^3 flops, about one sweep of the four to seven that Jacobi takes, and an evaluation of the tridiagonal's
// characteristic polynomial is linear in n. Every lane stops independently, depending only on its own values, so its
// bits do not depend on the other lanes or on when they stop.
//
// Sources: Golub and Van Loan, Matrix Computations, 4th ed., section 8.3.1, for the tridiagonalisation; Parlett, The
// Symmetric Eigenvalue Problem, section 8.11, for Laguerre's method.
#pragma once

#include <cstdint>
#include <utility>

#include "lanes.h"

namespace bdprune::core {

// The largest matrices that are processed in lanes (7x7 kernels need 49).
inline constexpr int kLaneSideMax = 49;

// Number of evaluations after which the iteration turns to bisection, and after which it always ends: 52 halvings
// exhaust any interval of doubles.
inline constexpr int kLaguerreSteps = 8, kMostSteps = kLaguerreSteps + 54;

template <typename V>
BDP_INLINE V lane_max(const V& a, const V& b) {
  return a > b ? a : b;
}

template <typename V>
BDP_INLINE V lane_min(const V& a, const V& b) {
  return a < b ? a : b;
}

template <typename V>
BDP_INLINE V lane_root(V x) {
  for (size_t l = 0; l < sizeof(V) / sizeof(double); ++l) x[l] = __builtin_sqrt(x[l]);
  return x;
}

// All ones if a comparison of V's lanes is true, otherwise zero.
template <typename V>
using Mask = decltype(V{} > V{});

// Same as `mask ? a : b`, which GCC compiles lane by lane for AVX-512 if the mask is more than one comparison.
template <typename V>
BDP_INLINE V choose(const Mask<V>& mask, const V& a, const V& b) {
  return (V)((mask & (Mask<V>)a) | (~mask & (Mask<V>)b));
}

template <typename V>
BDP_INLINE bool any_lane(const Mask<V>& mask) {
  int64_t any = 0;
  for (size_t l = 0; l < sizeof(V) / sizeof(double); ++l) any |= mask[l];
  return any != 0;
}

// kWays sets of matrices in parallel, since the operation chains of one set do not use the machine fully. The upper
// triangle of each is at m[way], with kSplit registers of V from one element to the next (see gram_block).
template <typename V, int kWays>
struct Matrices {
  static constexpr int64_t kSplit = sizeof(v8d) / sizeof(V);
  V* m[kWays];
  int64_t stride;
  int n;

  BDP_INLINE V& at(int way, int i, int j) const { return m[way][(i * stride + j) * kSplit]; }  // i <= j
};

template <typename V, int kWays>
struct Tridiagonal {
  V d[kLaneSideMax][kWays];   // the diagonal
  V e2[kLaneSideMax][kWays];  // squares of the off-diagonal elements, from e2[1]
};

// Maps row k beyond the diagonal to a multiple of its first unit vector by a reflection of the rows and columns after
// k. Couplings below 1e-150 of the trace are skipped, since their squares would underflow.
template <typename V, int kWays>
BDP_INLINE void reflect(const Matrices<V, kWays>& a, int k, Tridiagonal<V, kWays>& t) {
  const int first = k + 1, size = a.n - first;
  V v[kLaneSideMax][kWays], w[kLaneSideMax][kWays], inverse[kWays], half[kWays];
#pragma GCC unroll 2
  for (int way = 0; way < kWays; ++way) {
    V norm2 = {};
#pragma GCC unroll 8
    for (int i = 0; i < size; ++i) {
      const V x = a.at(way, k, first + i);
      v[i][way] = x;
      w[i][way] = V{};
      norm2 += x * x;
    }
    t.d[k][way] = a.at(way, k, k);
    t.e2[first][way] = norm2;
    const V root = lane_root(norm2), alpha = v[0][way] > 0.0 ? root : -root;
    v[0][way] += alpha;
    inverse[way] = norm2 > 1e-300 ? 1.0 / (v[0][way] * alpha) : V{};  // 2 / |v|^2
    half[way] = V{};
  }
  // A - v w^T - w v^T with w = p - (v^T p / |v|^2) v and p = 2 A v / |v|^2.
#pragma GCC unroll 8
  for (int i = 0; i < size; ++i) {
#pragma GCC unroll 2
    for (int way = 0; way < kWays; ++way) {
      V sum = w[i][way] + a.at(way, first + i, first + i) * v[i][way];
#pragma GCC unroll 8
      for (int j = i + 1; j < size; ++j) {
        const V x = a.at(way, first + i, first + j);
        sum += x * v[j][way];
        w[j][way] += x * v[i][way];
      }
      w[i][way] = sum * inverse[way];
      half[way] += w[i][way] * v[i][way];
    }
  }
#pragma GCC unroll 2
  for (int way = 0; way < kWays; ++way) half[way] *= 0.5 * inverse[way];
#pragma GCC unroll 8
  for (int i = 0; i < size; ++i) {
#pragma GCC unroll 2
    for (int way = 0; way < kWays; ++way) w[i][way] -= half[way] * v[i][way];
  }
#pragma GCC unroll 8
  for (int i = 0; i < size; ++i) {
#pragma GCC unroll 2
    for (int way = 0; way < kWays; ++way) {
#pragma GCC unroll 8
      for (int j = i; j < size; ++j) a.at(way, first + i, first + j) -= v[i][way] * w[j][way] + w[i][way] * v[j][way];
    }
  }
}

template <int kN, typename V, int kWays, int... kSteps>
BDP_INLINE void reflect_all(const Matrices<V, kWays>& a, Tridiagonal<V, kWays>& t,
                            std::integer_sequence<int, kSteps...>) {
  Matrices<V, kWays> fixed = a;
  fixed.stride = fixed.n = kN;
  (reflect(fixed, kSteps, t), ...);
}

// With kN the compiler knows the sizes and unrolls everything; the stride is then also kN.
template <int kN, typename V, int kWays>
BDP_INLINE void tridiagonalize(const Matrices<V, kWays>& a, Tridiagonal<V, kWays>& t) {
  const int n = a.n;
  if constexpr (kN > 0) {
    reflect_all<kN>(a, t, std::make_integer_sequence<int, kN - 2>{});
  } else {
    for (int k = 0; k + 2 < n; ++k) reflect(a, k, t);
  }
#pragma GCC unroll 2
  for (int way = 0; way < kWays; ++way) {
    const V beside = a.at(way, n - 2, n - 1);
    t.d[n - 2][way] = a.at(way, n - 2, n - 2);
    t.d[n - 1][way] = a.at(way, n - 1, n - 1);
    t.e2[n - 1][way] = beside * beside;
  }
}

// An upper bound on all eigenvalues, from their mean and variance (Laguerre's bound, from infinity).
template <typename V, int kWays>
BDP_INLINE V upper_bound(const Tridiagonal<V, kWays>& t, int n, int way) {
  V mean = t.d[0][way];
  for (int i = 1; i < n; ++i) mean += t.d[i][way];
  mean *= 1.0 / n;
  V spread = (t.d[0][way] - mean) * (t.d[0][way] - mean);
  for (int i = 1; i < n; ++i) {
    const V off = t.d[i][way] - mean;
    spread += off * off + 2.0 * t.e2[i][way];
  }
  // The rounding error of both is far below the factor.
  return (1.0 + 0x1p-46) * (mean + lane_root(V(spread * ((n - 1.0) / n))));
}

// Largest eigenvalues of positive semidefinite tridiagonals with trace 1 (or 0, or NaN, which is kept).
//
// The pivots q_i of x - T are all positive if and only if x exceeds every eigenvalue. The sums G of 1 / (x - lambda)
// and H of its squares follow from the pivots' first two derivatives. Above all eigenvalues every term is positive, so
// there is no cancellation, and as ratios they neither overflow nor underflow however close the eigenvalues are. They
// bound the largest eigenvalue: x - G / H is below it, and Laguerre's step, which converges cubically if the eigenvalue
// is simple, is above it. In a cluster the step is slow, and the interval is halved instead.
template <typename V, int kWays>
BDP_INLINE void largest_of(const Tridiagonal<V, kWays>& t, int n, V (&high)[kWays]) {
  V x[kWays], low[kWays];
  Mask<V> open[kWays];
#pragma GCC unroll 2
  for (int way = 0; way < kWays; ++way) {
    low[way] = V{};
    x[way] = high[way] = upper_bound(t, n, way);
    open[way] = x[way] == x[way];
  }
  for (int step = 0; step < kMostSteps; ++step) {
    V u[kWays], g[kWays], h[kWays], sum_g[kWays], sum_h[kWays];
    Mask<V> above[kWays];
#pragma GCC unroll 2
    for (int way = 0; way < kWays; ++way) {
      const V q = x[way] - t.d[0][way];
      above[way] = q > 0.0;
      g[way] = sum_g[way] = u[way] = 1.0 / q;
      h[way] = V{};
      sum_h[way] = u[way] * u[way];
    }
    for (int i = 1; i < n; ++i) {
#pragma GCC unroll 2
      for (int way = 0; way < kWays; ++way) {
        // g = q' / q and h = -q'' / q, first for the previous pivot, then for this one.
        const V c = t.e2[i][way] * u[way];
        const V q = (x[way] - t.d[i][way]) - c;
        above[way] &= q > 0.0;
        u[way] = 1.0 / q;
        h[way] = c * (h[way] + 2.0 * g[way] * g[way]) * u[way];
        g[way] = (1.0 + c * g[way]) * u[way];
        sum_g[way] += g[way];
        sum_h[way] += g[way] * g[way] + h[way];
      }
    }
    Mask<V> more = {};
#pragma GCC unroll 2
    for (int way = 0; way < kWays; ++way) {
      const V variance = lane_max(V(n * sum_h[way] - sum_g[way] * sum_g[way]), V{});
      const V down = n / (sum_g[way] + lane_root(V((n - 1.0) * variance)));
      const V new_high = choose<V>(open[way] & above[way], lane_min(high[way], V(x[way] - down)), high[way]);
      low[way] = lane_max(low[way], choose<V>(above[way], x[way] - sum_g[way] / sum_h[way], x[way]));
      const V gap = new_high - low[way];
      // Near a simple eigenvalue the step is more accurate than the interval: its error is at most half of gap^2 /
      // down.
      const Mask<V> simple = above[way] & (gap < 0.125 * down);
      high[way] = new_high;
      open[way] &= (gap > 0x1p-51 * new_high) & ~(simple & (gap * gap <= 0x1p-52 * new_high * down));
      const V middle = 0.5 * (low[way] + new_high);
      x[way] = step < kLaguerreSteps ? choose<V>(above[way], new_high, middle) : middle;
      more |= open[way];
    }
    if (!any_lane<V>(more)) return;
  }
}

}  // namespace bdprune::core
