#include "winograd_conv2d.h"

#include <algorithm>

#include "isa.h"
#include "lanes.h"

namespace bdprune::core {
namespace {

constexpr int64_t kEdge = 6;    // of a tile's input
constexpr int64_t kRows = 6;    // tiles in one product
constexpr int64_t kBlock = 48;  // tiles in one transform: their parts stay in the L2 cache
constexpr int64_t kSkew = 16;   // floats between the parts; without it they would share cache sets

// The points +-kA and +-kB, with kA * kB = 1.
constexpr float kA = 2.0f / 3, kB = 1.5f;
constexpr float kA2 = 4.0f / 9, kB2 = 2.25f, kA3 = 8.0f / 27, kB3 = 3.375f;
constexpr float kSum = 97.0f / 36;                          // kA2 + kB2
constexpr float kNormA = -81.0f / 130, kNormB = 8.0f / 65;  // 1 / prod (point - others)

template <int kBytes>
using Vector = typename Register<float, kBytes>::type;
template <int kBytes>
constexpr int64_t kWide = kBytes / sizeof(float);
template <int kBytes>
constexpr int64_t kPanel = 2 * kWide<kBytes>;

constexpr int64_t kRun = 16;  // inputs whose filters are gathered in one step: a cache line of channels_last weights

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

int64_t panel_width() { return isa() == Isa::kAvx512 ? kPanel<64> : isa() == Isa::kAvx2 ? kPanel<32> : kPanel<16>; }

// Floats of a row of a chunk, and between its parts. Rows are an odd number of cache lines long if the channels are a
// multiple of 32, so that a column of them does not map to few cache sets.
int64_t chunk_row(int64_t channels) { return round_up(channels, panel_width()) + kSkew; }
int64_t chunk_part(int64_t channels) { return kWinogradChunk * chunk_row(channels) + kSkew; }

// Floats between the parts of the sums: rows of inputs, padded to whole products, by columns of outputs.
int64_t sums_part(int64_t inputs, int64_t width) { return round_up(inputs, kRows) * width + kSkew; }

// Floats between the parts of transformed filters.
constexpr int64_t filter_part(int64_t inputs, int64_t width) { return inputs * width + kSkew; }

// Up to a whole vector of floats; the lanes beyond `count` are zero on loading and are not stored.
template <typename V>
BDP_INLINE V load_some(const float* p, int64_t count) {
  if (count >= static_cast<int64_t>(sizeof(V) / sizeof(float))) return load<V>(p);
  V v = {};
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
  return v;
}

template <typename V>
BDP_INLINE void store_some(float* p, const V& v, int64_t count) {
  if (count >= static_cast<int64_t>(sizeof(V) / sizeof(float))) return store(p, v);
  std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
}

// B^T d.
template <typename V>
BDP_INLINE void input_line(const V (&d)[6], V (&out)[6]) {
  const V even_a = d[4] - kB2 * d[2], odd_a = d[3] - kB2 * d[1];
  const V even_b = d[4] - kA2 * d[2], odd_b = d[3] - kA2 * d[1];
  out[0] = d[0] - kSum * d[2] + d[4];
  out[1] = even_a + kA * odd_a;
  out[2] = even_a - kA * odd_a;
  out[3] = even_b + kB * odd_b;
  out[4] = even_b - kB * odd_b;
  out[5] = d[1] - kSum * d[3] + d[5];
}

// A^T m.
template <typename V>
BDP_INLINE void output_line(const V (&m)[6], V (&out)[4]) {
  const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  out[0] = m[0] + even_a + even_b;
  out[1] = kA * odd_a + kB * odd_b;
  out[2] = kA2 * even_a + kB2 * even_b;
  out[3] = kA3 * odd_a + kB3 * odd_b + m[5];
}

// A y, the adjoint of output_line.
template <typename V>
BDP_INLINE void gradient_line(const V (&y)[4], V (&out)[6]) {
  const V even_a = y[0] + kA2 * y[2], odd_a = kA * y[1] + kA3 * y[3];
  const V even_b = y[0] + kB2 * y[2], odd_b = kB * y[1] + kB3 * y[3];
  out[0] = y[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = y[3];
}

// G^T m, the adjoint of filter_line.
template <typename V>
BDP_INLINE void weight_line(const V (&m)[6], V (&out)[3]) {
  const V even_a = kNormA * (m[1] + m[2]), odd_a = (kNormA * kA) * (m[1] - m[2]);
  const V even_b = kNormB * (m[3] + m[4]), odd_b = (kNormB * kB) * (m[3] - m[4]);
  out[0] = m[0] + even_a + even_b;
  out[1] = odd_a + odd_b;
  out[2] = kA2 * even_a + kB2 * even_b + m[5];
}

// G g.
template <typename V>
BDP_INLINE void filter_line(const V& g0, const V& g1, const V& g2, V (&out)[6]) {
  const V even_a = kNormA * (g0 + kA2 * g2), odd_a = (kNormA * kA) * g1;
  const V even_b = kNormB * (g0 + kB2 * g2), odd_b = (kNormB * kB) * g1;
  out[0] = g0;
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = g2;
}

// The position of tile `index`.
struct Place {
  int64_t sample, y, x;
};

BDP_INLINE Place place(const WinogradMap& map, int64_t index) {
  const int64_t across = map.tiles_across(), each = map.tiles_down() * across;
  return {index / each, index % each / across * kWinogradTile, index % across * kWinogradTile};
}

// A buffer of transformed tiles: part p of tile t starts at data + p * part + t * row.
struct Parts {
  float* data;
  int64_t part, row;
};

// Transforms the tiles [begin, end) of the map into the rows of `out`; `zeros` has as many elements as channels.
template <int kBytes>
BDP_INLINE void transform_inputs(const WinogradMap& map, const float* data, int64_t begin, int64_t end,
                                 const float* zeros, const Parts& out) {
  using V = Vector<kBytes>;
  for (int64_t index = begin; index < end; ++index) {
    const Place at = place(map, index);
    const float* from[kWinogradParts];
    for (int64_t i = 0; i < kEdge; ++i) {
      for (int64_t j = 0; j < kEdge; ++j) {
        const int64_t y = at.y + i - 1, x = at.x + j - 1;
        const bool inside = y >= 0 && y < map.height && x >= 0 && x < map.width;
        from[i * kEdge + j] = inside ? data + ((at.sample * map.height + y) * map.width + x) * map.channels : zeros;
      }
    }
    float* row = out.data + (index - begin) * out.row;
    for (int64_t c = 0; c < map.channels; c += kWide<kBytes>) {
      const int64_t lanes = map.channels - c;
      V half[6][6];
#pragma GCC unroll 6
      for (int64_t j = 0; j < kEdge; ++j) {
        V d[6], line[6];
#pragma GCC unroll 6
        for (int64_t i = 0; i < kEdge; ++i) d[i] = load_some<V>(from[i * kEdge + j] + c, lanes);
        input_line(d, line);
#pragma GCC unroll 6
        for (int64_t i = 0; i < kEdge; ++i) half[i][j] = line[i];
      }
#pragma GCC unroll 6
      for (int64_t i = 0; i < kEdge; ++i) {
        V line[6];
        input_line(half[i], line);
#pragma GCC unroll 6
        for (int64_t j = 0; j < kEdge; ++j) store(row + (i * kEdge + j) * out.part + c, line[j]);
      }
    }
  }
}

// Writes the outputs of the tiles [begin, end) from the rows of `products`.
template <int kBytes>
BDP_INLINE void transform_outputs(const WinogradMap& map, const Parts& products, int64_t begin, int64_t end,
                                  const WinogradEpilogue& epilogue, float* data) {
  using V = Vector<kBytes>;
  for (int64_t index = begin; index < end; ++index) {
    const Place at = place(map, index);
    const float* row = products.data + (index - begin) * products.row;
    const int64_t corner = ((at.sample * map.height + at.y) * map.width + at.x) * map.channels;
    const int64_t down = std::min<int64_t>(kWinogradTile, map.height - at.y);
    const int64_t across = std::min<int64_t>(kWinogradTile, map.width - at.x);
    for (int64_t c = 0; c < map.channels; c += kWide<kBytes>) {
      const int64_t lanes = map.channels - c;
      const V offset = epilogue.bias ? load_some<V>(epilogue.bias + c, lanes) : V{};
      const V factor = epilogue.mask ? load_some<V>(epilogue.mask + c, lanes) : V{} + 1.0f;
      V half[4][6];
#pragma GCC unroll 6
      for (int64_t j = 0; j < kEdge; ++j) {
        V m[6], line[4];
#pragma GCC unroll 6
        for (int64_t i = 0; i < kEdge; ++i) m[i] = load<V>(row + (i * kEdge + j) * products.part + c);
        output_line(m, line);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kWinogradTile; ++i) half[i][j] = line[i];
      }
      for (int64_t i = 0; i < down; ++i) {
        V line[4];
        output_line(half[i], line);
        for (int64_t j = 0; j < across; ++j) {
          const int64_t to = corner + (i * map.width + j) * map.channels + c;
          const V unmasked = line[j] + offset;
          if (epilogue.unmasked) store_some<V>(epilogue.unmasked + to, unmasked, lanes);
          store_some<V>(data + to, unmasked * factor, lanes);
        }
      }
    }
  }
}

// Transforms the gradients of the outputs of the tiles [begin, end) into the rows of `out`.
template <int kBytes>
BDP_INLINE void transform_gradients(const WinogradMap& map, const float* data, int64_t begin, int64_t end,
                                    const Parts& out) {
  using V = Vector<kBytes>;
  for (int64_t index = begin; index < end; ++index) {
    const Place at = place(map, index);
    float* row = out.data + (index - begin) * out.row;
    const float* corner = data + ((at.sample * map.height + at.y) * map.width + at.x) * map.channels;
    const int64_t down = std::min<int64_t>(kWinogradTile, map.height - at.y);
    const int64_t across = std::min<int64_t>(kWinogradTile, map.width - at.x);
    for (int64_t c = 0; c < map.channels; c += kWide<kBytes>) {
      const int64_t lanes = map.channels - c;
      V half[6][4];
#pragma GCC unroll 4
      for (int64_t j = 0; j < kWinogradTile; ++j) {
        V y[4] = {}, line[6];
        for (int64_t i = 0; i < down && j < across; ++i) {
          y[i] = load_some<V>(corner + (i * map.width + j) * map.channels + c, lanes);
        }
        gradient_line(y, line);
#pragma GCC unroll 6
        for (int64_t i = 0; i < kEdge; ++i) half[i][j] = line[i];
      }
#pragma GCC unroll 6
      for (int64_t i = 0; i < kEdge; ++i) {
        V line[6];
        gradient_line(half[i], line);
#pragma GCC unroll 6
        for (int64_t j = 0; j < kEdge; ++j) store(row + (i * kEdge + j) * out.part + c, line[j]);
      }
    }
  }
}

// out[i][:] = sum over k of a[i * a_row + k * a_step] * b[k * b_step + :], for kRows rows i and one panel of columns;
// with kAdd it adds to out.
template <int kBytes, bool kAdd>
BDP_INLINE void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t depth,
                        float* out, int64_t out_row) {
  using V = Vector<kBytes>;
  V left[kRows] = {}, right[kRows] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    const V first = in_register(load<V>(b)), second = in_register(load<V>(b + kWide<kBytes>));
#pragma GCC unroll 6
    for (int64_t i = 0; i < kRows; ++i) {
      left[i] += a[i * a_row] * first;
      right[i] += a[i * a_row] * second;
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kRows; ++i) {
    float* to = out + i * out_row;
    store(to, kAdd ? load<V>(to) + left[i] : left[i]);
    store(to + kWide<kBytes>, kAdd ? load<V>(to + kWide<kBytes>) + right[i] : right[i]);
  }
}

// The taps of kRun inputs and one vector of outputs: float [kRun, 9, kWide].
template <int kBytes>
BDP_INLINE void gather_filters(const WinogradFilters& filters, int64_t output, int64_t input, float* taps) {
  const int64_t lanes = std::clamp<int64_t>(filters.outputs - output, 0, kWide<kBytes>);
  const int64_t count = std::min(filters.inputs - input, kRun);
  const float* from = filters.data + output * filters.output_stride + input * filters.input_stride;
  if (filters.output_stride == 1 && lanes == kWide<kBytes>) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t offset = tap / 3 * filters.row_stride + tap % 3 * filters.column_stride;
        store(taps + (i * 9 + tap) * kWide<kBytes>, load<Vector<kBytes>>(from + i * filters.input_stride + offset));
      }
    }
    return;
  }
  std::fill(taps, taps + kRun * 9 * kWide<kBytes>, 0.0f);
  for (int64_t lane = 0; lane < lanes; ++lane, from += filters.output_stride) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      const float* at = from + tap / 3 * filters.row_stride + tap % 3 * filters.column_stride;
      for (int64_t i = 0; i < count; ++i) taps[(i * 9 + tap) * kWide<kBytes> + lane] = at[i * filters.input_stride];
    }
  }
}

template <int kBytes>
BDP_INLINE void filters_any(const WinogradFilters& filters, int64_t begin, int64_t end, float* transformed) {
  using V = Vector<kBytes>;
  const int64_t part = filter_part(filters.inputs, winograd_panels(filters.outputs) * kPanel<kBytes>);
  for (int64_t output = begin * kPanel<kBytes>; output < end * kPanel<kBytes>; output += kWide<kBytes>) {
    float* column = transformed + output / kPanel<kBytes> * filters.inputs * kPanel<kBytes> + output % kPanel<kBytes>;
    for (int64_t first = 0; first < filters.inputs; first += kRun) {
      float taps[kRun * 9 * kWide<kBytes>];
      gather_filters<kBytes>(filters, output, first, taps);
      for (int64_t input = first; input < std::min(first + kRun, filters.inputs); ++input) {
        const float scale = filters.input_scale ? filters.input_scale[input] : 1.0f;
        V g[9], half[3][6];
#pragma GCC unroll 9
        for (int64_t tap = 0; tap < 9; ++tap) {
          g[tap] = scale * load<V>(taps + ((input - first) * 9 + tap) * kWide<kBytes>);
        }
#pragma GCC unroll 3
        for (int64_t j = 0; j < 3; ++j) filter_line(g[j], g[3 + j], g[6 + j], half[j]);
        float* out = column + input * kPanel<kBytes>;
#pragma GCC unroll 6
        for (int64_t i = 0; i < kEdge; ++i) {
          V line[6];
          filter_line(half[0][i], half[1][i], half[2][i], line);
#pragma GCC unroll 6
          for (int64_t j = 0; j < kEdge; ++j) store(out + (i * kEdge + j) * part, line[j]);
        }
      }
    }
  }
}

template <int kBytes>
BDP_INLINE void forward_any(const WinogradMap& x, const float* data, const float* transformed,
                            const WinogradEpilogue& epilogue, int64_t outputs, const float* zeros, int64_t begin,
                            int64_t end, float* scratch, float* out) {
  const int64_t panels = winograd_panels(outputs);
  const int64_t depth = round_up(x.channels, kWide<kBytes>), width = panels * kPanel<kBytes>;
  const Parts inputs{scratch, kBlock * depth + kSkew, depth};
  const Parts products{scratch + kWinogradParts * inputs.part, kBlock * width + kSkew, width};
  const WinogradMap map{x.samples, x.height, x.width, outputs};
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = std::min(first + kBlock, end), rows = round_up(last - first, kRows);
    transform_inputs<kBytes>(x, data, first, last, zeros, inputs);
    for (int64_t part = 0; part < kWinogradParts; ++part) {
      float* left = inputs.data + part * inputs.part;
      const float* filters = transformed + part * filter_part(x.channels, width);
      std::fill(left + (last - first) * depth, left + rows * depth, 0.0f);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const float* right = filters + panel * x.channels * kPanel<kBytes>;
        float* to = products.data + part * products.part + panel * kPanel<kBytes>;
        for (int64_t row = 0; row < rows; row += kRows) {
          product<kBytes, false>(left + row * depth, depth, 1, right, kPanel<kBytes>, x.channels, to + row * width,
                                 width);
        }
      }
    }
    transform_outputs<kBytes>(map, products, first, last, epilogue, out);
  }
}

// Adds the products of the parts [begin, end) of a chunk to the sums.
template <int kBytes>
BDP_INLINE void products_any(const WinogradChunk& chunk, const float* inputs, const float* gradients, bool first,
                             int64_t begin, int64_t end, float* sums) {
  const int64_t panels = winograd_panels(chunk.outputs), width = panels * kPanel<kBytes>;
  const int64_t input_row = chunk_row(chunk.inputs), gradient_row = chunk_row(chunk.outputs);
  for (int64_t part = begin; part < end; ++part) {
    const float* left = inputs + part * chunk_part(chunk.inputs);
    const float* right = gradients + part * chunk_part(chunk.outputs);
    float* to = sums + part * sums_part(chunk.inputs, width);
    for (int64_t panel = 0; panel < width; panel += kPanel<kBytes>) {
      for (int64_t row = 0; row < chunk.inputs; row += kRows) {
        float* sum = to + row * width + panel;
        if (first) {
          product<kBytes, false>(left + row, 1, input_row, right + panel, gradient_row, chunk.tiles, sum, width);
        } else {
          product<kBytes, true>(left + row, 1, input_row, right + panel, gradient_row, chunk.tiles, sum, width);
        }
      }
    }
  }
}

template <int kBytes>
BDP_INLINE void weight_any(const float* sums, const WinogradFilters& filters, int64_t begin, int64_t end,
                           float* gradient) {
  using V = Vector<kBytes>;
  const int64_t width = winograd_panels(filters.outputs) * kPanel<kBytes>, part = sums_part(filters.inputs, width);
  for (int64_t output = begin * kPanel<kBytes>; output < end * kPanel<kBytes>; output += kWide<kBytes>) {
    const int64_t lanes = std::clamp<int64_t>(filters.outputs - output, 0, kWide<kBytes>);
    for (int64_t first = 0; first < filters.inputs; first += kRun) {
      const int64_t count = std::min(filters.inputs - first, kRun);
      float taps[kRun * 9 * kWide<kBytes>];
      for (int64_t i = 0; i < count; ++i) {
        V half[3][6];
#pragma GCC unroll 6
        for (int64_t j = 0; j < kEdge; ++j) {
          V m[6], line[3];
#pragma GCC unroll 6
          for (int64_t k = 0; k < kEdge; ++k) {
            m[k] = load<V>(sums + (k * kEdge + j) * part + (first + i) * width + output);
          }
          weight_line(m, line);
#pragma GCC unroll 3
          for (int64_t k = 0; k < 3; ++k) half[k][j] = line[k];
        }
#pragma GCC unroll 3
        for (int64_t k = 0; k < 3; ++k) {
          V line[3];
          weight_line(half[k], line);
#pragma GCC unroll 3
          for (int64_t j = 0; j < 3; ++j) store(taps + (i * 9 + k * 3 + j) * kWide<kBytes>, line[j]);
        }
      }
      float* to = gradient + output * filters.output_stride + first * filters.input_stride;
      for (int64_t lane = 0; lane < lanes; ++lane, to += filters.output_stride) {
        for (int64_t tap = 0; tap < 9; ++tap) {
          float* at = to + tap / 3 * filters.row_stride + tap % 3 * filters.column_stride;
          for (int64_t i = 0; i < count; ++i) at[i * filters.input_stride] = taps[(i * 9 + tap) * kWide<kBytes> + lane];
        }
      }
    }
  }
}

#if BDP_X86
BDP_TARGET_AVX512 void filters_avx512(const WinogradFilters& filters, int64_t begin, int64_t end, float* transformed) {
  filters_any<64>(filters, begin, end, transformed);
}
BDP_TARGET_AVX2 void filters_avx2(const WinogradFilters& filters, int64_t begin, int64_t end, float* transformed) {
  filters_any<32>(filters, begin, end, transformed);
}
BDP_TARGET_AVX512 void forward_avx512(const WinogradMap& x, const float* data, const float* transformed,
                                      const WinogradEpilogue& epilogue, int64_t outputs, const float* zeros,
                                      int64_t begin, int64_t end, float* scratch, float* out) {
  forward_any<64>(x, data, transformed, epilogue, outputs, zeros, begin, end, scratch, out);
}
BDP_TARGET_AVX2 void forward_avx2(const WinogradMap& x, const float* data, const float* transformed,
                                  const WinogradEpilogue& epilogue, int64_t outputs, const float* zeros, int64_t begin,
                                  int64_t end, float* scratch, float* out) {
  forward_any<32>(x, data, transformed, epilogue, outputs, zeros, begin, end, scratch, out);
}
BDP_TARGET_AVX512 void inputs_avx512(const WinogradMap& map, const float* data, int64_t begin, int64_t end,
                                     const float* zeros, const Parts& out) {
  transform_inputs<64>(map, data, begin, end, zeros, out);
}
BDP_TARGET_AVX2 void inputs_avx2(const WinogradMap& map, const float* data, int64_t begin, int64_t end,
                                 const float* zeros, const Parts& out) {
  transform_inputs<32>(map, data, begin, end, zeros, out);
}
BDP_TARGET_AVX512 void gradients_avx512(const WinogradMap& map, const float* data, int64_t begin, int64_t end,
                                        const Parts& out) {
  transform_gradients<64>(map, data, begin, end, out);
}
BDP_TARGET_AVX2 void gradients_avx2(const WinogradMap& map, const float* data, int64_t begin, int64_t end,
                                    const Parts& out) {
  transform_gradients<32>(map, data, begin, end, out);
}
BDP_TARGET_AVX512 void products_avx512(const WinogradChunk& chunk, const float* inputs, const float* gradients,
                                       bool first, int64_t begin, int64_t end, float* sums) {
  products_any<64>(chunk, inputs, gradients, first, begin, end, sums);
}
BDP_TARGET_AVX2 void products_avx2(const WinogradChunk& chunk, const float* inputs, const float* gradients, bool first,
                                   int64_t begin, int64_t end, float* sums) {
  products_any<32>(chunk, inputs, gradients, first, begin, end, sums);
}
BDP_TARGET_AVX512 void weight_avx512(const float* sums, const WinogradFilters& filters, int64_t begin, int64_t end,
                                     float* gradient) {
  weight_any<64>(sums, filters, begin, end, gradient);
}
BDP_TARGET_AVX2 void weight_avx2(const float* sums, const WinogradFilters& filters, int64_t begin, int64_t end,
                                 float* gradient) {
  weight_any<32>(sums, filters, begin, end, gradient);
}
#endif

}  // namespace

int64_t winograd_panels(int64_t outputs) { return (outputs + panel_width() - 1) / panel_width(); }

int64_t winograd_filter_floats(int64_t inputs, int64_t outputs) {
  return kWinogradParts * filter_part(inputs, winograd_panels(outputs) * panel_width());
}

void winograd_filters(const WinogradFilters& filters, int64_t begin, int64_t end, float* transformed) {
#if BDP_X86
  if (isa() == Isa::kAvx512) return filters_avx512(filters, begin, end, transformed);
  if (isa() == Isa::kAvx2) return filters_avx2(filters, begin, end, transformed);
#endif
  filters_any<16>(filters, begin, end, transformed);
}

int64_t winograd_scratch(int64_t inputs, int64_t outputs) {
  const int64_t depth = round_up(inputs, panel_width()), width = winograd_panels(outputs) * panel_width();
  return kWinogradParts * (kBlock * (depth + width) + 2 * kSkew);
}

void winograd_forward(const WinogradMap& x, const float* data, const float* transformed,
                      const WinogradEpilogue& epilogue, int64_t outputs, const float* zeros, int64_t begin, int64_t end,
                      float* scratch, float* out) {
#if BDP_X86
  if (isa() == Isa::kAvx512)
    return forward_avx512(x, data, transformed, epilogue, outputs, zeros, begin, end, scratch, out);
  if (isa() == Isa::kAvx2)
    return forward_avx2(x, data, transformed, epilogue, outputs, zeros, begin, end, scratch, out);
#endif
  forward_any<16>(x, data, transformed, epilogue, outputs, zeros, begin, end, scratch, out);
}

int64_t winograd_chunk_floats(int64_t channels) { return kWinogradParts * chunk_part(channels); }

int64_t winograd_sum_floats(int64_t inputs, int64_t outputs) {
  return kWinogradParts * sums_part(inputs, winograd_panels(outputs) * panel_width());
}

void winograd_inputs(const WinogradMap& x, const float* data, const float* zeros, int64_t first, int64_t begin,
                     int64_t end, float* chunk) {
  const int64_t row = chunk_row(x.channels);
  const Parts out{chunk + (begin - first) * row, chunk_part(x.channels), row};
#if BDP_X86
  if (isa() == Isa::kAvx512) return inputs_avx512(x, data, begin, end, zeros, out);
  if (isa() == Isa::kAvx2) return inputs_avx2(x, data, begin, end, zeros, out);
#endif
  transform_inputs<16>(x, data, begin, end, zeros, out);
}

void winograd_gradients(const WinogradMap& grad, const float* data, int64_t first, int64_t begin, int64_t end,
                        float* chunk) {
  const int64_t row = chunk_row(grad.channels);
  const Parts out{chunk + (begin - first) * row, chunk_part(grad.channels), row};
#if BDP_X86
  if (isa() == Isa::kAvx512) return gradients_avx512(grad, data, begin, end, out);
  if (isa() == Isa::kAvx2) return gradients_avx2(grad, data, begin, end, out);
#endif
  transform_gradients<16>(grad, data, begin, end, out);
}

void winograd_products(const WinogradChunk& chunk, const float* inputs, const float* gradients, bool first,
                       int64_t begin, int64_t end, float* sums) {
#if BDP_X86
  if (isa() == Isa::kAvx512) return products_avx512(chunk, inputs, gradients, first, begin, end, sums);
  if (isa() == Isa::kAvx2) return products_avx2(chunk, inputs, gradients, first, begin, end, sums);
#endif
  products_any<16>(chunk, inputs, gradients, first, begin, end, sums);
}

void winograd_weight_grad(const float* sums, const WinogradFilters& filters, int64_t begin, int64_t end,
                          float* gradient) {
#if BDP_X86
  if (isa() == Isa::kAvx512) return weight_avx512(sums, filters, begin, end, gradient);
  if (isa() == Isa::kAvx2) return weight_avx2(sums, filters, begin, end, gradient);
#endif
  weight_any<16>(sums, filters, begin, end, gradient);
}

}  // namespace bdprune::core
