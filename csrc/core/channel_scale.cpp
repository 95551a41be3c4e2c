#include "channel_scale.h"

#include "isa.h"
#include "lanes.h"

namespace bdprune::core {
namespace {

template <typename T>
BDP_INLINE auto load_mask(const double* mask) {
  if constexpr (std::is_same_v<T, double>) {
    return load<v8d>(mask);
  } else {
    return __builtin_convertvector(load<v8d>(mask), v8f);
  }
}

template <typename T>
BDP_INLINE void rows_forward(const T* z, const double* mask, int64_t channels, int64_t width, int64_t begin,
                             int64_t end, T* out) {
  for (int64_t row = begin; row < end; ++row) {
    const auto m = static_cast<Compute<T>>(mask[row % channels]);
    const T* from = z + row * width;
    T* to = out + row * width;
    int64_t i = 0;
    for (; i + 8 <= width; i += 8) store_compute(to + i, load_compute(from + i) * m);
    for (; i < width; ++i) narrow(widen(from[i]) * m, to + i);
  }
}

template <typename T>
BDP_INLINE void columns_forward(const T* z, const double* mask, int64_t channels, int64_t begin, int64_t end, T* out) {
  for (int64_t row = begin; row < end; ++row) {
    const T* from = z + row * channels;
    T* to = out + row * channels;
    int64_t c = 0;
    for (; c + 8 <= channels; c += 8) store_compute(to + c, load_compute(from + c) * load_mask<T>(mask + c));
    for (; c < channels; ++c) narrow(widen(from[c]) * static_cast<Compute<T>>(mask[c]), to + c);
  }
}

template <typename T, bool kGrad, bool kDots>
BDP_INLINE void rows_backward(const T* grad, const T* z, const double* mask, int64_t channels, int64_t width,
                              int64_t begin, int64_t end, T* dz, double* dots) {
  for (int64_t row = begin; row < end; ++row) {
    const auto m = static_cast<Compute<T>>(mask[row % channels]);
    const int64_t at = row * width;
    v8d sum = {};
    double rest = 0.0;
    int64_t i = 0;
    for (; i + 8 <= width; i += 8) {
      const auto g = load_compute(grad + at + i);
      if constexpr (kGrad) store_compute(dz + at + i, g * m);
      if constexpr (kDots) sum += to_double(g) * to_double(load_compute(z + at + i));
    }
    for (; i < width; ++i) {
      const auto g = widen(grad[at + i]);
      if constexpr (kGrad) narrow(g * m, dz + at + i);
      if constexpr (kDots) rest += static_cast<double>(g) * static_cast<double>(widen(z[at + i]));
    }
    if constexpr (kDots) dots[row] = sum_lanes(sum) + rest;
  }
}

template <typename T, bool kGrad, bool kDots>
BDP_INLINE void columns_backward(const T* grad, const T* z, const double* mask, int64_t channels, int64_t begin,
                                 int64_t end, T* dz, double* dots) {
  if constexpr (kDots) std::memset(dots, 0, static_cast<size_t>(channels) * sizeof(double));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * channels;
    int64_t c = 0;
    for (; c + 8 <= channels; c += 8) {
      const auto g = load_compute(grad + at + c);
      if constexpr (kGrad) store_compute(dz + at + c, g * load_mask<T>(mask + c));
      if constexpr (kDots) {
        const v8d product = to_double(g) * to_double(load_compute(z + at + c));
        store(dots + c, load<v8d>(dots + c) + product);
      }
    }
    for (; c < channels; ++c) {
      const auto g = widen(grad[at + c]);
      if constexpr (kGrad) narrow(g * static_cast<Compute<T>>(mask[c]), dz + at + c);
      if constexpr (kDots) dots[c] += static_cast<double>(g) * static_cast<double>(widen(z[at + c]));
    }
  }
}

// The arguments of all four kernels; `width` is 0 if the channels are the columns.
struct Call {
  const void *grad, *z;
  const double* mask;
  int64_t channels, width, begin, end;
  void* out;
  double* dots;
};

template <typename T>
BDP_INLINE void run_typed(const Call& call) {
  const T *grad = static_cast<const T*>(call.grad), *z = static_cast<const T*>(call.z);
  T* out = static_cast<T*>(call.out);
  const int64_t channels = call.channels, width = call.width, begin = call.begin, end = call.end;
  if (width > 0) {
    if (!grad) return rows_forward(z, call.mask, channels, width, begin, end, out);
    if (out && call.dots)
      return rows_backward<T, true, true>(grad, z, call.mask, channels, width, begin, end, out, call.dots);
    if (out) return rows_backward<T, true, false>(grad, z, call.mask, channels, width, begin, end, out, nullptr);
    return rows_backward<T, false, true>(grad, z, call.mask, channels, width, begin, end, nullptr, call.dots);
  }
  if (!grad) return columns_forward(z, call.mask, channels, begin, end, out);
  if (out && call.dots)
    return columns_backward<T, true, true>(grad, z, call.mask, channels, begin, end, out, call.dots);
  if (out) return columns_backward<T, true, false>(grad, z, call.mask, channels, begin, end, out, nullptr);
  return columns_backward<T, false, true>(grad, z, call.mask, channels, begin, end, nullptr, call.dots);
}

BDP_INLINE void run_any(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::kFloat:
      return run_typed<float>(call);
    case Dtype::kDouble:
      return run_typed<double>(call);
    case Dtype::kHalf:
      return run_typed<Half>(call);
    case Dtype::kBFloat16:
      return run_typed<BFloat16>(call);
  }
}

#if BDP_X86
BDP_TARGET_AVX512 void run_avx512(Dtype dtype, const Call& call) { run_any(dtype, call); }
BDP_TARGET_AVX2 void run_avx2(Dtype dtype, const Call& call) { run_any(dtype, call); }
#endif

void run(Dtype dtype, const Call& call) {
#if BDP_X86
  if (isa() == Isa::kAvx512) return run_avx512(dtype, call);
  if (isa() == Isa::kAvx2) return run_avx2(dtype, call);
#endif
  run_any(dtype, call);
}

}  // namespace

void scale_rows(Dtype dtype, const void* z, const double* mask, int64_t channels, int64_t width, int64_t begin,
                int64_t end, void* out) {
  run(dtype, {nullptr, z, mask, channels, width, begin, end, out, nullptr});
}

void scale_columns(Dtype dtype, const void* z, const double* mask, int64_t channels, int64_t begin, int64_t end,
                   void* out) {
  run(dtype, {nullptr, z, mask, channels, 0, begin, end, out, nullptr});
}

void scale_rows_backward(Dtype dtype, const void* grad, const void* z, const double* mask, int64_t channels,
                         int64_t width, int64_t begin, int64_t end, void* dz, double* dots) {
  run(dtype, {grad, z, mask, channels, width, begin, end, dz, dots});
}

void scale_columns_backward(Dtype dtype, const void* grad, const void* z, const double* mask, int64_t channels,
                            int64_t begin, int64_t end, void* dz, double* dots) {
  run(dtype, {grad, z, mask, channels, 0, begin, end, dz, dots});
}

}  // namespace bdprune::core
