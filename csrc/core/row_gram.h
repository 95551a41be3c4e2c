// Gram matrices of 3x3 filters in registers of eight floats, one filter at a time. Lanes run along a row of nine
// values, not across filters: nothing is transposed or packed, and a filter is read once from front to back, which the
// hardware prefetches.
//
// The first eight values of a row x0 .. x8 are one register a of two halves. Six products of it, in the order of
// kProducts, contain all 45 products of two values; rearrangements within a half are the cheapest.
//
// Precision: an accumulator sums kRunRows products in float; kRuns of those are summed in float and then added to
// doubles. The relative error of a sum of squares is below (kRunRows / 2 + kRuns / 4 + 2) 2^-24 = 1.2e-6, and that of
// the norm half of it, if all rounding errors are as large as possible and have the same sign. Measured if all have
// the same sign: 2.3e-7 of the norm; on random filters 4e-8.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"

namespace bdprune::core {

inline constexpr int64_t kRunRows = 32, kRuns = 8;

// Rows that are widened to float in one chunk.
inline constexpr int64_t kWidenedRows = kRunRows * kRuns;

inline constexpr int kRowProducts = 6;

struct Product {
  int i, j;  // of x_i x_j, i <= j; -1 if not needed
};

inline constexpr Product kProducts[kRowProducts][kLanes] = {
    {{0, 0}, {1, 1}, {2, 2}, {3, 3}, {4, 4}, {5, 5}, {6, 6}, {7, 7}},
    {{0, 1}, {1, 2}, {2, 3}, {0, 3}, {4, 5}, {5, 6}, {6, 7}, {4, 7}},
    {{0, 5}, {1, 6}, {2, 7}, {3, 4}, {1, 4}, {2, 5}, {3, 6}, {0, 7}},
    {{0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {0, 6}, {1, 7}},
    {{0, 2}, {1, 3}, {-1, -1}, {-1, -1}, {4, 6}, {5, 7}, {8, 8}, {-1, -1}},
    {{0, 8}, {1, 8}, {2, 8}, {3, 8}, {4, 8}, {5, 8}, {6, 8}, {7, 8}},
};

// Adds the products of the row at x; with kLast it reads nothing after the row.
template <bool kLast>
BDP_INLINE void add_row(const float* x, v8f (&sums)[kRowProducts]) {
  const v8f a = in_register(load<v8f>(x));
  const float last = x[8];
  const v8f ends = in_register(v8f{last, last, last, last, last, last, last, last});
  const v8f exchanged = in_register(__builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3));
  v8f second;  // [x2 ..], the last lane is not needed
  if constexpr (kLast) {
    const v8f first = load<v8f>(x + 1);
    second = __builtin_shufflevector(first, first, 1, 2, 3, 4, 5, 6, 7, 7);
  } else {
    second = load<v8f>(x + 2);
  }
  sums[0] += a * a;
  sums[1] += a * __builtin_shufflevector(a, a, 1, 2, 3, 0, 5, 6, 7, 4);
  sums[2] += a * __builtin_shufflevector(exchanged, exchanged, 1, 2, 3, 0, 5, 6, 7, 4);
  sums[3] += a * __builtin_shufflevector(exchanged, exchanged, 0, 1, 2, 3, 6, 7, 4, 5);
  sums[4] += __builtin_shufflevector(a, ends, 0, 1, 2, 3, 4, 5, 14, 7) * second;
  sums[5] += a * ends;
}

// Adds the products of `rows` rows at x, at most kRunRows * kRuns, to `sums`, D's lanes at a time.
template <typename D>
BDP_INLINE void add_rows(const float* x, int64_t rows, double* sums) {
  v8f total[kRowProducts] = {};
  while (rows > 0) {
    // Two accumulators of each product, since the additions of one depend on each other.
    v8f even[kRowProducts] = {}, odd[kRowProducts] = {};
    int64_t left = std::min(2 * kRunRows, rows);
    rows -= left;
    for (; left > 2; left -= 2, x += 18) {
      add_row<false>(x, even);
      add_row<false>(x + 9, odd);
    }
    if (left == 2) add_row<false>(x, even), x += 9;
    add_row<true>(x, odd), x += 9;
#pragma GCC unroll 6
    for (int k = 0; k < kRowProducts; ++k) total[k] += even[k] + odd[k];
  }
  constexpr int kCount = sizeof(D) / sizeof(double);
#pragma GCC unroll 6
  for (int k = 0; k < kRowProducts; ++k) {
    float single[kLanes];
    store(single, total[k]);
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; lane += kCount, sums += kCount)
      store(sums, load<D>(sums) + widen_to(single + lane, D{}));
  }
}

// `count` values times `factor` as float.
template <typename T>
BDP_INLINE void widen_scaled(const T* x, int64_t count, float factor, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load_float(x + i) * factor);
  for (; i < count; ++i) out[i] = widen(x[i]) * factor;
}

// Sums of the products, in the order of kProducts, of the dense row-major [rows, 9] filter x times `factor`.
template <typename D, typename T>
BDP_INLINE void row_sums(const T* x, int64_t rows, double factor, double (&sums)[kRowProducts * kLanes]) {
  std::memset(sums, 0, sizeof(sums));
  for (int64_t start = 0; start < rows; start += kWidenedRows) {
    const int64_t count = std::min(kWidenedRows, rows - start);
    if constexpr (std::is_same_v<T, float>) {
      if (factor == 1.0) {
        add_rows<D>(x + start * 9, count, sums);
        continue;
      }
    }
    float wide[kWidenedRows * 9];
    widen_scaled(x + start * 9, count * 9, static_cast<float>(factor), wide);
    add_rows<D>(wide, count, sums);
  }
}

// The sums of eight filters as Gram matrices, one filter per lane: element (i, j), i <= j, at gram[(9 i + j) kLanes].
BDP_INLINE void to_lanes(const double (&sums)[kLanes][kRowProducts * kLanes], double* gram) {
#pragma GCC unroll 12
  for (int place = 0; place < kRowProducts * kLanes; place += 4) {
#pragma GCC unroll 2
    for (int lane = 0; lane < kLanes; lane += 4) {
      const v4d a = load<v4d>(sums[lane] + place), b = load<v4d>(sums[lane + 1] + place);
      const v4d c = load<v4d>(sums[lane + 2] + place), d = load<v4d>(sums[lane + 3] + place);
      const v4d ab[2] = {__builtin_shufflevector(a, b, 0, 4, 2, 6), __builtin_shufflevector(a, b, 1, 5, 3, 7)};
      const v4d cd[2] = {__builtin_shufflevector(c, d, 0, 4, 2, 6), __builtin_shufflevector(c, d, 1, 5, 3, 7)};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Product product = kProducts[place / kLanes][place % kLanes + k];
        if (product.i < 0) continue;
        const v4d four = k < 2 ? __builtin_shufflevector(ab[k % 2], cd[k % 2], 0, 1, 4, 5)
                               : __builtin_shufflevector(ab[k % 2], cd[k % 2], 2, 3, 6, 7);
        store(gram + (9 * product.i + product.j) * kLanes + lane, four);
      }
    }
  }
}

}  // namespace bdprune::core
