// Cyclic Jacobi for small symmetric matrices: the schedule and one rotation for the CUDA kernels, whose threads run the
// rotations of a step in parallel, and a plain version for tests. The CPU uses eigen_lanes.h.
//
// Source: Golub and Van Loan, Matrix Computations, 4th ed., section 8.5. The order of the rotations is the round robin
// of section 8.5.6: the pairs of one step are disjoint, so they can run in parallel.
#pragma once

#include <cmath>

#include "macros.h"

namespace bdprune::core {

// Jacobi diagonalises sizes up to this (7x7 kernels need 49).
inline constexpr int kJacobiMax = 49;

// Sweeps after which the largest eigenvalue of an n x n Gram matrix is accurate to a few ulp of float64. Measured on
// random, rank-1, graded and repeated spectra (tests/core/test_jacobi.py); convergence is quadratic, so the margin is
// one sweep.
BDP_HD constexpr int jacobi_sweeps(int n) { return n <= 2 ? 2 : n <= 4 ? 4 : n <= 9 ? 5 : n <= 25 ? 6 : 7; }

// Number of steps in one sweep. The pairs of one step are disjoint; all steps visit every pair once.
BDP_HD constexpr int jacobi_steps(int n) { return n % 2 == 0 ? n - 1 : n; }

// Pairs in one step.
BDP_HD constexpr int jacobi_pairs(int n) { return n / 2; }

struct Pair {
  int p, q;  // p < q
};

// The i-th pair (0 <= i < jacobi_pairs(n)) of the given step (0 <= step < jacobi_steps(n)).
// The circle method: m = jacobi_steps(n) indices stand on a circle and are paired across an axis through `step`;
// for even n the remaining index on the axis is paired with n - 1.
BDP_HD constexpr Pair jacobi_pair(int n, int step, int i) {
  const int m = jacobi_steps(n);
  if (n % 2 == 0 && i == n / 2 - 1) return {step, n - 1};
  const int a = (step + i + 1) % m, b = (step - i - 1 + m) % m;
  return a < b ? Pair{a, b} : Pair{b, a};
}

// Rotation [c s; -s c] that annihilates a_pq: t = tan of the smaller angle, |t| <= 1.
template <typename T>
struct Rotation {
  T c, s, t;
};

template <typename T>
BDP_HD BDP_INLINE Rotation<T> jacobi_rotation(T app, T aqq, T apq) {
  if (apq == T(0)) return {T(1), T(0), T(0)};
  const T d = T(0.5) * (aqq - app);
  const T h = sqrt(d * d + apq * apq);
  const T t = h > T(0) ? apq / (d >= T(0) ? d + h : d - h) : T(0);
  const T c = T(1) / sqrt(T(1) + t * t);
  return {c, t * c, t};
}

// Largest eigenvalue of the symmetric n x n matrix `a` (row-major, both triangles, overwritten), by `sweeps` full
// sweeps. The matrix is first scaled to trace 1, which a Gram matrix allows, so that squares neither overflow nor
// underflow. A trace of zero is returned unchanged; a trace that is not finite gives NaN.
template <typename T>
BDP_HD inline T jacobi_largest(T* a, int n, int sweeps) {
  T trace = T(0);
  for (int i = 0; i < n; ++i) trace += a[i * n + i];
  if (trace == T(0)) return trace;
  if (!(trace - trace == T(0))) return T(NAN);
  for (int i = 0; i < n * n; ++i) a[i] /= trace;
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    for (int step = 0; step < jacobi_steps(n); ++step) {
      for (int i = 0; i < jacobi_pairs(n); ++i) {
        const Pair pair = jacobi_pair(n, step, i);
        const int p = pair.p, q = pair.q;
        const T apq = a[p * n + q];
        const Rotation<T> r = jacobi_rotation(a[p * n + p], a[q * n + q], apq);
        a[p * n + p] -= r.t * apq;
        a[q * n + q] += r.t * apq;
        a[p * n + q] = a[q * n + p] = T(0);
        for (int k = 0; k < n; ++k) {
          if (k == p || k == q) continue;
          const T kp = a[k * n + p], kq = a[k * n + q];
          a[k * n + p] = a[p * n + k] = r.c * kp - r.s * kq;
          a[k * n + q] = a[q * n + k] = r.s * kp + r.c * kq;
        }
      }
    }
  }
  T largest = a[0];
  for (int i = 1; i < n; ++i) largest = a[i * n + i] > largest ? a[i * n + i] : largest;
  return largest * trace;
}

}  // namespace bdprune::core
