#include "stamp.h"

#include <algorithm>

#include "isa.h"
#include "lanes.h"

namespace bdprune::core {
namespace {

// Images that one pass over a tile processes: several for float only, because the other types would need much code.
template <typename T>
constexpr int kTogether = std::is_same_v<T, float> ? 4 : 1;

#define BDP_INLINE_LAMBDA __attribute__((always_inline))

// A tile and where its elements lie. Scratch holds a tile in the order of the images, without the other positions.
struct Place {
  const Stamps& maps;
  const StampTile& tile;
  int64_t width, elements;
  ImageStrides packed;

  Place(const Stamps& stamps, const StampTile& one)
      : maps(stamps),
        tile(one),
        width(one.end - one.begin),
        elements(width * stamps.channels),
        packed(stamps.image.channel == 1 ? stamps.image : ImageStrides{width, 1}) {}

  int64_t size() const { return maps.channels * maps.positions; }

  // The first element of the tile in the trigger's mask and in its pattern.
  int64_t in_masks() const { return tile.trigger * maps.positions + tile.begin; }
  int64_t in_patterns() const { return tile.trigger * size() + tile.begin * maps.pattern.position; }

  // The first element of the trigger's image n, before and after it is stamped.
  int64_t in_images(int64_t n) const { return size() * (maps.picks ? maps.picks[tile.trigger * maps.count + n] : n); }
  int64_t in_stamped(int64_t n) const { return size() * (tile.trigger * maps.count + n); }
};

// Calls fn(place in an image, place in the tile, elements) for each stretch of the tile that is dense in an image.
template <typename Fn>
BDP_INLINE void for_each_run(const Place& place, Fn&& fn) {
  const Stamps& maps = place.maps;
  if (maps.image.channel == 1 || place.width == maps.positions) {
    fn(place.tile.begin * maps.image.position, int64_t{0}, place.elements);
    return;
  }
  for (int64_t c = 0; c < maps.channels; ++c) {
    fn(c * maps.positions + place.tile.begin, c * place.width, place.width);
  }
}

template <int kImages>
struct Images {
  static constexpr int kCount = kImages;
};

// Calls fn(n, Images<k>) for groups of k images [n, n + k), in order.
template <typename T, typename Fn>
BDP_INLINE void for_each_group(int64_t count, Fn&& fn) {
  int64_t n = 0;
  if constexpr (kTogether<T> > 1) {
    for (; n + kTogether<T> <= count; n += kTogether<T>) fn(n, Images<kTogether<T>>{});
  }
  for (; n < count; ++n) fn(n, Images<1>{});
}

// What a tile needs before and after its images. It is short work, so it is compiled once, not per instruction set.

// Copies `channels` rows of `width` positions from one order of memory to another.
template <typename C>
__attribute__((noinline)) void copy_rows(const C* from, ImageStrides source, C* to, ImageStrides target,
                                         int64_t channels, int64_t width) {
  if (source.channel == 1 && target.channel == 1) {  // channels fastest in both
    std::memcpy(to, from, static_cast<size_t>(channels * width) * sizeof(C));
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < width; ++p) {
      to[c * target.channel + p * target.position] = from[c * source.channel + p * source.position];
    }
  }
}

// The pattern of the tile in the order of scratch, and its mask as often as it has channels.
template <typename C>
void copy_pattern(const Place& place, C* to) {
  copy_rows(static_cast<const C*>(place.maps.patterns) + place.in_patterns(), place.maps.pattern, to, place.packed,
            place.maps.channels, place.width);
}

// add <- mask * pattern, keep <- 1 - mask.
template <typename C>
__attribute__((noinline)) void prepare_blend(const Place& place, C* add, C* keep) {
  const C* mask = static_cast<const C*>(place.maps.masks) + place.in_masks();
  copy_pattern(place, add);
  copy_rows(mask, {0, 1}, keep, place.packed, place.maps.channels, place.width);
  for (int64_t i = 0; i < place.elements; ++i) {
    add[i] *= keep[i];
    keep[i] = 1 - keep[i];
  }
}

// The gradients of a tile from its sums, as far as they are needed.
template <typename C>
__attribute__((noinline)) void write_gradients(const Place& place, const double* sums, const double* dots,
                                               C* grad_masks, C* grad_patterns) {
  const ImageStrides from = place.packed, to = place.maps.pattern;
  const C* mask = place.maps.masks ? static_cast<const C*>(place.maps.masks) + place.in_masks() : nullptr;
  for (int64_t p = 0; p < place.width; ++p) {
    const double opacity = mask ? mask[p] : 1.0;
    double dot = 0;
    for (int64_t c = 0; c < place.maps.channels; ++c) {
      const int64_t i = c * from.channel + p * from.position;
      if (grad_masks) dot += dots[i];
      if (!grad_patterns) continue;
      C* grad = grad_patterns + place.in_patterns();
      grad[c * to.channel + p * to.position] = static_cast<C>(opacity * sums[i]);
    }
    if (grad_masks) grad_masks[place.in_masks() + p] = static_cast<C>(dot);
  }
}

// x in [0, 1], for one number or for eight.
template <typename V>
BDP_INLINE V clipped(V x) {
  const V zero = {}, one = zero + 1;
  x = x < zero ? zero : x;
  return x > one ? one : x;
}

// The gradient g of a clipped sum.
template <typename V>
BDP_INLINE V passed(V sum, V g) {
  const V zero = {}, one = zero + 1;
  g = sum >= zero ? g : zero;
  return sum <= one ? g : zero;
}

// out = x * keep + add, or the clipped x + add, for `width` elements of kImages images.
template <bool kBlend, typename T, int kImages>
BDP_INLINE void stamp_run(const T* const (&x)[kImages], const Compute<T>* keep, const Compute<T>* add, int64_t width,
                          T* const (&out)[kImages]) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const auto a = load_compute(add + i), k = load_compute(keep + i);
    for (int j = 0; j < kImages; ++j) {
      const auto pixel = load_compute(x[j] + i);
      store_compute(out[j] + i, kBlend ? pixel * k + a : clipped(pixel + a));
    }
  }
  for (; i < width; ++i) {
    for (int j = 0; j < kImages; ++j) {
      const Compute<T> pixel = widen(x[j][i]);
      narrow(kBlend ? pixel * keep[i] + add[i] : clipped(pixel + add[i]), out[j] + i);
    }
  }
}

template <bool kBlend, typename T>
BDP_INLINE void forward(const Place& place, T* out, void* scratch) {
  using C = Compute<T>;
  const T* images = static_cast<const T*>(place.maps.images);
  C *add = static_cast<C*>(scratch), *keep = kBlend ? add + place.elements : add;
  if constexpr (kBlend) {
    prepare_blend(place, add, keep);
  } else {
    copy_pattern(place, add);
  }
  for_each_group<T>(place.maps.count, [&](int64_t n, auto group) BDP_INLINE_LAMBDA {
    constexpr int kImages = decltype(group)::kCount;
    for_each_run(place, [&](int64_t in_image, int64_t in_tile, int64_t width) BDP_INLINE_LAMBDA {
      const T* x[kImages];
      T* to[kImages];
      for (int j = 0; j < kImages; ++j) {
        x[j] = images + place.in_images(n + j) + in_image;
        to[j] = out + place.in_stamped(n + j) + in_image;
      }
      stamp_run<kBlend, T, kImages>(x, keep + in_tile, add + in_tile, width, to);
    });
  });
}

// Adds to `sums` the gradients g of kImages images, as far as a clip passes them, and to `dots` g * (pattern - pixel).
template <bool kBlend, typename T, int kImages>
BDP_INLINE void sum_run(const T* const (&x)[kImages], const T* const (&grad)[kImages], const Compute<T>* pattern,
                        int64_t width, double* sums, double* dots) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const auto colour = load_compute(pattern + i);
    std::remove_const_t<decltype(colour)> sum = {}, dot = {};
    for (int j = 0; j < kImages; ++j) {
      auto g = load_compute(grad[j] + i);
      if constexpr (!kBlend) g = passed(load_compute(x[j] + i) + colour, g);
      sum += g;
      if constexpr (kBlend) dot += g * (colour - load_compute(x[j] + i));
    }
    store(sums + i, load<v8d>(sums + i) + to_double(sum));
    if constexpr (kBlend) store(dots + i, load<v8d>(dots + i) + to_double(dot));
  }
  for (; i < width; ++i) {
    Compute<T> sum = 0, dot = 0;
    for (int j = 0; j < kImages; ++j) {
      const Compute<T> pixel = widen(x[j][i]), g = widen(grad[j][i]);
      sum += kBlend ? g : passed(pixel + pattern[i], g);
      dot += g * (pattern[i] - pixel);
    }
    sums[i] += sum;
    if constexpr (kBlend) dots[i] += dot;
  }
}

template <bool kBlend, typename T>
BDP_INLINE void backward(const Place& place, const T* grad, Compute<T>* grad_masks, Compute<T>* grad_patterns,
                         void* scratch) {
  using C = Compute<T>;
  const T* images = static_cast<const T*>(place.maps.images);
  double *sums = static_cast<double*>(scratch), *dots = sums + place.elements;
  C* pattern = reinterpret_cast<C*>(dots + place.elements);
  copy_pattern(place, pattern);
  std::memset(sums, 0, static_cast<size_t>(2 * place.elements) * sizeof(double));
  for_each_group<T>(place.maps.count, [&](int64_t n, auto group) BDP_INLINE_LAMBDA {
    constexpr int kImages = decltype(group)::kCount;
    for_each_run(place, [&](int64_t in_image, int64_t in_tile, int64_t width) BDP_INLINE_LAMBDA {
      const T *x[kImages], *g[kImages];
      for (int j = 0; j < kImages; ++j) {
        x[j] = images + place.in_images(n + j) + in_image;
        g[j] = grad + place.in_stamped(n + j) + in_image;
      }
      sum_run<kBlend, T, kImages>(x, g, pattern + in_tile, width, sums + in_tile, dots + in_tile);
    });
  });
  write_gradients(place, sums, dots, grad_masks, grad_patterns);
}

// The arrays of one direction; `out` is null in the backward.
struct Arrays {
  void* out;
  const void* grad;
  void *grad_masks, *grad_patterns, *scratch;
};

template <typename T>
BDP_INLINE void run_typed(const Place& place, const Arrays& arrays) {
  T* out = static_cast<T*>(arrays.out);
  const T* grad = static_cast<const T*>(arrays.grad);
  auto *masks = static_cast<Compute<T>*>(arrays.grad_masks), *patterns = static_cast<Compute<T>*>(arrays.grad_patterns);
  void* scratch = arrays.scratch;
  if (out && place.maps.masks) return forward<true, T>(place, out, scratch);
  if (out) return forward<false, T>(place, out, scratch);
  if (place.maps.masks) return backward<true, T>(place, grad, masks, patterns, scratch);
  return backward<false, T>(place, grad, masks, patterns, scratch);
}

BDP_INLINE void run_any(const Place& place, const Arrays& arrays) {
  switch (place.maps.dtype) {
    case Dtype::kFloat:
      return run_typed<float>(place, arrays);
    case Dtype::kDouble:
      return run_typed<double>(place, arrays);
    case Dtype::kHalf:
      return run_typed<Half>(place, arrays);
    case Dtype::kBFloat16:
      return run_typed<BFloat16>(place, arrays);
  }
}

#if BDP_X86
BDP_TARGET_AVX512 void run_avx512(const Place& place, const Arrays& arrays) { run_any(place, arrays); }
BDP_TARGET_AVX2 void run_avx2(const Place& place, const Arrays& arrays) { run_any(place, arrays); }
#endif

void run(const Place& place, const Arrays& arrays) {
#if BDP_X86
  if (isa() == Isa::kAvx512) return run_avx512(place, arrays);
  if (isa() == Isa::kAvx2) return run_avx2(place, arrays);
#endif
  run_any(place, arrays);
}

}  // namespace

int64_t stamp_scratch_bytes(int64_t elements) { return elements * 3 * static_cast<int64_t>(sizeof(double)); }

void stamp(const Stamps& stamps, const StampTile& tile, void* out, void* scratch) {
  run(Place(stamps, tile), {out, nullptr, nullptr, nullptr, scratch});
}

void stamp_backward(const Stamps& stamps, const StampTile& tile, const void* grad, void* grad_masks,
                    void* grad_patterns, void* scratch) {
  run(Place(stamps, tile), {nullptr, grad, grad_masks, grad_patterns, scratch});
}

}  // namespace bdprune::core
