// Eight lanes of float or double, as GCC vector extensions: the compiler lowers one v8d to one AVX-512 register, two
// AVX or four SSE/NEON ones, so the same source serves every instruction set. Everything here is always inlined, so
// that it gets the target attribute of the kernel that uses it (see isa.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "macros.h"

namespace bdprune::core {

inline constexpr int kLanes = 8;

typedef float v4f __attribute__((vector_size(16)));
typedef float v8f __attribute__((vector_size(32)));
typedef float v16f __attribute__((vector_size(64)));
typedef double v2d __attribute__((vector_size(16)));
typedef double v4d __attribute__((vector_size(32)));
typedef double v8d __attribute__((vector_size(64)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint32_t v8u __attribute__((vector_size(32)));
typedef uint16_t v8h __attribute__((vector_size(16)));

// A vector of kBytes; for templates, where the attribute can't depend on a parameter directly.
template <typename T, int kBytes>
struct Register {
  typedef T type __attribute__((vector_size(kBytes)));
};

// 16-bit floats as stored in memory.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename V, typename T>
BDP_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
BDP_INLINE void store(T* p, const V& v) {
  std::memcpy(p, &v, sizeof(V));
}

// Loads x once: GCC would load it again for every use, more than the load ports can do during multiply-adds.
template <typename V>
BDP_INLINE V in_register(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#endif
  return x;
}

BDP_INLINE v8f half_to_float(v8h bits) {
  const v8u h = __builtin_convertvector(bits, v8u);
  const v8u sign = (h & 0x8000u) << 16;
  const v8u magnitude = (h & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  const v8u finite = (v8u)((v8f)magnitude * 0x1p112f);
  const v8u special = magnitude | 0x7f800000u;
  const v8u is_special = (v8u)(magnitude >= 0x0f800000u);
  return (v8f)(sign | (is_special & special) | (~is_special & finite));
}

BDP_INLINE v8f bfloat16_to_float(v8h bits) { return (v8f)(__builtin_convertvector(bits, v8u) << 16); }

// Rounds to nearest even; NaN stays NaN.
BDP_INLINE v8h float_to_bfloat16(v8f x) {
  const v8u u = (v8u)x;
  const v8u rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const v8u is_nan = (v8u)(x != x);
  return __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), v8h);
}

// Rounds to nearest even; overflows to Inf; NaN stays NaN.
BDP_INLINE v8h float_to_half(v8f x) {
  const v8u sign = ((v8u)x >> 16) & 0x8000u;
  const v8u u = (v8u)x & 0x7fffffffu;
  // Normal range: move the bias from 127 to 15 and round away the low 13 bits.
  const v8u normal = (u - 0x38000000u + 0x0fffu + ((u >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the bottom of the sum.
  const v8u small = (v8u)((v8f)u + 0.5f) - 0x3f000000u;
  const v8u is_small = (v8u)(u < 0x38800000u), is_large = (v8u)(u >= 0x477ff000u), is_nan = (v8u)(u > 0x7f800000u);
  const v8u finite = (is_small & small) | (~is_small & normal);
  const v8u large = (is_nan & 0x7e00u) | (~is_nan & 0x7c00u);
  return __builtin_convertvector(sign | (is_large & large) | (~is_large & finite), v8h);
}

// Eight consecutive elements as float.
BDP_INLINE v8f load_float(const float* p) { return load<v8f>(p); }
BDP_INLINE v8f load_float(const Half* p) { return half_to_float(load<v8h>(p)); }
BDP_INLINE v8f load_float(const BFloat16* p) { return bfloat16_to_float(load<v8h>(p)); }

BDP_INLINE void store_float(float* p, const v8f& x) { store(p, x); }
BDP_INLINE void store_float(Half* p, const v8f& x) { store(p, float_to_half(x)); }
BDP_INLINE void store_float(BFloat16* p, const v8f& x) { store(p, float_to_bfloat16(x)); }

// Four consecutive elements as float.
BDP_INLINE v4f load_four(const float* p) { return load<v4f>(p); }
template <typename T>
BDP_INLINE v4f load_four(const T* p) {
  T eight[8] = {p[0], p[1], p[2], p[3]};
  const v8f x = load_float(eight);
  return __builtin_shufflevector(x, x, 0, 1, 2, 3);
}

// Eight consecutive elements as double.
template <typename T>
BDP_INLINE v8d load_double(const T* p) {
  return __builtin_convertvector(load_float(p), v8d);
}
BDP_INLINE v8d load_double(const double* p) { return load<v8d>(p); }

// As many consecutive elements as a register of doubles holds.
BDP_INLINE v2d widen_to(const float* p, v2d) { return v2d{p[0], p[1]}; }
BDP_INLINE v4d widen_to(const float* p, v4d) { return v4d{p[0], p[1], p[2], p[3]}; }
BDP_INLINE v8d widen_to(const float* p, v8d) { return v8d{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }
template <typename D>
BDP_INLINE D widen_to(const double* p, D) {
  return load<D>(p);
}

// One element as float or, for double, as double; and back.
BDP_INLINE float widen(float x) { return x; }
BDP_INLINE double widen(double x) { return x; }
BDP_INLINE float widen(Half x) { return half_to_float(v8h{x.bits})[0]; }
BDP_INLINE float widen(BFloat16 x) { return bfloat16_to_float(v8h{x.bits})[0]; }

BDP_INLINE void narrow(float x, float* p) { *p = x; }
BDP_INLINE void narrow(double x, double* p) { *p = x; }
BDP_INLINE void narrow(float x, Half* p) { p->bits = float_to_half(v8f{x})[0]; }
BDP_INLINE void narrow(float x, BFloat16* p) { p->bits = float_to_bfloat16(v8f{x})[0]; }

// The type to compute in, and eight elements of a map in that type.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
BDP_INLINE auto load_compute(const T* p) {
  if constexpr (std::is_same_v<T, double>) {
    return load<v8d>(p);
  } else {
    return load_float(p);
  }
}

BDP_INLINE void store_compute(double* p, const v8d& x) { store(p, x); }
template <typename T>
BDP_INLINE void store_compute(T* p, const v8f& x) {
  store_float(p, x);
}

BDP_INLINE v8d to_double(const v8f& x) { return __builtin_convertvector(x, v8d); }
BDP_INLINE v8d to_double(const v8d& x) { return x; }

// Sum of the lanes, always in the same order.
BDP_INLINE double sum_lanes(const v8d& v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// r[i][j] <- r[j][i]: three rounds of two-register shuffles.
BDP_INLINE void transpose(v8f (&r)[8]) {
  v8f a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const int k = 4 * i;
    b[k] = __builtin_shufflevector(a[k], a[k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    b[k + 1] = __builtin_shufflevector(a[k], a[k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    b[k + 2] = __builtin_shufflevector(a[k + 1], a[k + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    b[k + 3] = __builtin_shufflevector(a[k + 1], a[k + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

}  // namespace bdprune::core
