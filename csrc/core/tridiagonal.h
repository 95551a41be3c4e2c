// Largest eigenvalue of a symmetric matrix of any size: Householder tridiagonalisation, then bisection on Sturm counts.
// Used for filters with both sides above kLaneSideMax, one at a time; smaller ones use eigen_lanes.h.
//
// Source: Golub and Van Loan, Matrix Computations, 4th ed., sections 8.3.1 and 8.4.1.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

namespace bdprune::core {

// Reduces the symmetric `a` (row-major [n, n], overwritten) to diagonal d [n] and off-diagonal e [n] (e[0] = 0).
// `work` holds n doubles.
inline void tridiagonalize(double* a, int64_t n, double* d, double* e, double* work) {
  e[0] = 0.0;
  for (int64_t k = 0; k + 1 < n; ++k) {
    // Reflector that maps the column below the diagonal to its first entry; v overwrites that part of row k.
    const int64_t m = n - k - 1;
    double* v = a + k * n + k + 1;
    double norm2 = 0.0;
    for (int64_t i = 0; i < m; ++i) norm2 += v[i] * v[i];
    const double alpha = v[0] > 0.0 ? -std::sqrt(norm2) : std::sqrt(norm2);
    e[k + 1] = alpha;
    const double beta = norm2 - alpha * v[0];  // = |v - alpha e1|^2 / 2
    if (beta <= 0.0) continue;
    v[0] -= alpha;
    // A <- A - v w^T - w v^T on the trailing block, with w = A v / beta - (v^T A v / (2 beta^2)) v.
    double vw = 0.0;
    for (int64_t i = 0; i < m; ++i) {
      const double* row = a + (k + 1 + i) * n + k + 1;
      double dot = 0.0;
      for (int64_t j = 0; j < m; ++j) dot += row[j] * v[j];
      work[i] = dot / beta;
      vw += work[i] * v[i];
    }
    const double half = vw / (2.0 * beta);
    for (int64_t i = 0; i < m; ++i) work[i] -= half * v[i];
    for (int64_t i = 0; i < m; ++i) {
      double* row = a + (k + 1 + i) * n + k + 1;
      for (int64_t j = 0; j < m; ++j) row[j] -= v[i] * work[j] + work[i] * v[j];
    }
  }
  for (int64_t i = 0; i < n; ++i) d[i] = a[i * n + i];
}

// Number of eigenvalues of the tridiagonal (d, e) that are smaller than x.
inline int64_t sturm_count(const double* d, const double* e, int64_t n, double x) {
  int64_t count = 0;
  double q = 1.0;
  for (int64_t i = 0; i < n; ++i) {
    q = d[i] - x - e[i] * e[i] / q;
    if (q == 0.0) q = DBL_MIN;
    count += q < 0.0;
  }
  return count;
}

// Largest eigenvalue of the symmetric positive semidefinite `a` (row-major [n, n], overwritten) with trace 1.
// `work` holds 3 n doubles. Bisection between 0 and Gershgorin's bound stops at the spacing of doubles.
inline double largest_eigenvalue(double* a, int64_t n, double* work) {
  double *d = work, *e = work + n;
  tridiagonalize(a, n, d, e, work + 2 * n);
  double high = 0.0, low = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    low = std::max(low, d[i]);
    high = std::max(high, d[i] + std::fabs(e[i]) + (i + 1 < n ? std::fabs(e[i + 1]) : 0.0));
  }
  for (;;) {
    const double middle = 0.5 * (low + high);
    if (middle <= low || middle >= high) return high;
    (sturm_count(d, e, n, middle) < n ? low : high) = middle;
  }
}

}  // namespace bdprune::core
