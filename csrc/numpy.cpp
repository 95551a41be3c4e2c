// The NumPy face of csrc/core (pybind11, no torch): what bdprune.screen runs on, and what the tests of the core call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/channel_moments.h"
#include "core/filter_spectral_norms.h"
#include "core/implicit_gemm.h"
#include "core/isa.h"
#include "core/jacobi.h"
#include "core/tridiagonal.h"

namespace py = pybind11;

namespace {

using bdprune::core::Dtype;
using bdprune::core::FilterBank;
using bdprune::core::kBatch;

using Matrix = py::array_t<double, py::array::c_style | py::array::forcecast>;

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kFloat;
  if (name == "float64") return Dtype::kDouble;
  if (name == "float16") return Dtype::kHalf;
  if (name == "bfloat16") return Dtype::kBFloat16;
  throw py::value_error("dtype must be float16, bfloat16, float32 or float64, got " + name);
}

py::array_t<double> spectral_norms(const py::buffer& weights, const std::string& dtype, py::ssize_t count,
                                   py::ssize_t rows, py::ssize_t cols) {
  const py::buffer_info info = weights.request();
  const FilterBank bank{info.ptr, dtype_of(dtype), count, rows, cols};
  const py::ssize_t item = bank.dtype == Dtype::kDouble ? 8 : bank.dtype == Dtype::kFloat ? 4 : 2;
  if (count < 0 || rows < 0 || cols < 0) throw py::value_error("sizes must not be negative");
  py::ssize_t needed = item;
  for (py::ssize_t size : {count, rows, cols}) {
    if (__builtin_mul_overflow(needed, size, &needed)) throw py::value_error("sizes are too large");
  }
  if (needed != info.size * info.itemsize)
    throw py::value_error("the buffer holds " + std::to_string(info.size * info.itemsize) + " bytes, " +
                          std::to_string(needed) + " are needed");
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("the buffer must be C-contiguous");
  py::array_t<double> result(count);
  double* out = result.mutable_data();
  {
    py::gil_scoped_release release;
    const auto bytes = static_cast<size_t>(bdprune::core::spectral_scratch(bank)) * sizeof(double);
    auto* scratch = static_cast<double*>(::operator new(bytes, std::align_val_t(64)));
    double norms[kBatch];
    for (int64_t batch = 0; batch < bank.batches(); ++batch) {
      bdprune::core::spectral_norms(bank, batch, scratch, norms);
      std::copy_n(norms, std::min<int64_t>(kBatch, count - batch * kBatch), out + batch * kBatch);
    }
    ::operator delete(scratch, std::align_val_t(64));
  }
  return result;
}

// Sums of one feature map [samples, channels, positions] (or [samples, positions, channels]) around `shift`.
py::tuple channel_moments(const py::array_t<float, py::array::c_style | py::array::forcecast>& x, const Matrix& shift,
                          bool channels_fastest) {
  if (x.ndim() != 3) throw py::value_error("x must have 3 dimensions, got " + std::to_string(x.ndim()));
  const py::ssize_t channels = x.shape(channels_fastest ? 2 : 1), positions = x.shape(channels_fastest ? 1 : 2);
  if (shift.ndim() != 1 || shift.shape(0) != channels) throw py::value_error("shift must have one value per channel");
  const bdprune::core::FeatureView view{x.data(), Dtype::kFloat, x.shape(0), channels, positions, channels_fastest};
  py::array_t<double> cross({channels, channels}), sum(channels), norm_sum(channels);
  for (auto* array : {&cross, &sum, &norm_sum}) std::fill_n(array->mutable_data(), array->size(), 0.0);
  std::vector<double> squares(static_cast<size_t>(channels));
  const auto bytes = static_cast<size_t>(bdprune::core::moment_buffer_bytes(view));
  void* buffer = ::operator new(bytes, std::align_val_t(64));
  std::fill_n(static_cast<char*>(buffer), bytes, 0);
  const bdprune::core::MomentState state{sum.mutable_data(), norm_sum.mutable_data(), squares.data()};
  const int64_t total = x.shape(0) * positions;
  for (int64_t start = 0; start < total; start += bdprune::core::kChunk) {
    const int64_t count = std::min(bdprune::core::kChunk, total - start);
    bdprune::core::pack_moments(view, shift.data(), start, count, 0, view.octets(), buffer, state);
    bdprune::core::cross_moments(view, count, 0, bdprune::core::moment_pairs(view), buffer, cross.mutable_data());
  }
  ::operator delete(buffer, std::align_val_t(64));
  double* c = cross.mutable_data();
  for (py::ssize_t i = 0; i < channels; ++i) {
    for (py::ssize_t j = 0; j < i; ++j) c[i * channels + j] = c[j * channels + i];
  }
  return py::make_tuple(cross, sum, norm_sum);
}

void check_square(const Matrix& a) {
  if (a.ndim() != 2 || a.shape(0) != a.shape(1) || a.shape(0) == 0)
    throw py::value_error("expected a non-empty square matrix");
}

double jacobi_largest(const Matrix& matrix, int sweeps) {
  check_square(matrix);
  const int n = static_cast<int>(matrix.shape(0));
  std::vector<double> a(matrix.data(), matrix.data() + matrix.size());
  return bdprune::core::jacobi_largest(a.data(), n, sweeps > 0 ? sweeps : bdprune::core::jacobi_sweeps(n));
}

double tridiagonal_largest(const Matrix& matrix) {
  check_square(matrix);
  const auto n = static_cast<int64_t>(matrix.shape(0));
  std::vector<double> a(matrix.data(), matrix.data() + matrix.size()), work(static_cast<size_t>(3 * n));
  return bdprune::core::largest_eigenvalue(a.data(), n, work.data());
}

py::list jacobi_schedule(int n) {
  py::list steps;
  for (int step = 0; step < bdprune::core::jacobi_steps(n); ++step) {
    py::list pairs;
    for (int i = 0; i < bdprune::core::jacobi_pairs(n); ++i) {
      const auto pair = bdprune::core::jacobi_pair(n, step, i);
      pairs.append(py::make_tuple(pair.p, pair.q));
    }
    steps.append(pairs);
  }
  return steps;
}

// Where a tap reads: for each position of the map that the rows run over, that of the other map, or -1.
py::array_t<int64_t> conv_sources(std::pair<int, int> size, std::pair<int, int> out_size, std::pair<int, int> kernel,
                                  std::pair<int, int> stride, std::pair<int, int> pad, std::pair<int, int> dilation,
                                  std::pair<int, int> tap, bool gradient) {
  const bdprune::core::ConvShape shape{size.first,   size.second,   out_size.first, out_size.second,
                                       kernel.first, kernel.second, stride.first,   stride.second,
                                       pad.first,    pad.second,    dilation.first, dilation.second};
  const auto& rows = gradient ? size : out_size;
  py::array_t<int64_t> sources({rows.first, rows.second});
  int64_t* to = sources.mutable_data();
  for (int y = 0; y < rows.first; ++y) {
    for (int x = 0; x < rows.second; ++x) {
      *to++ = gradient ? bdprune::core::source_position<true>(shape, y, x, tap.first, tap.second)
                       : bdprune::core::source_position<false>(shape, y, x, tap.first, tap.second);
    }
  }
  return sources;
}

py::tuple conv_tile(int64_t block, int64_t row_tiles, int64_t column_tiles, int64_t groups) {
  const auto tile = bdprune::core::conv_tile(block, row_tiles, column_tiles, groups);
  return py::make_tuple(tile.map, tile.group, tile.column_tile, tile.row_tile);
}

py::list conv_walk(std::pair<int, int> kernel, int64_t depth, const std::optional<std::vector<float>>& mask) {
  bdprune::core::ConvShape shape{};
  shape.kernel_height = kernel.first;
  shape.kernel_width = kernel.second;
  if (mask && static_cast<int64_t>(mask->size()) != depth)
    throw py::value_error("mask must have one value per channel");
  py::list steps;
  for (bdprune::core::ConvWalk walk(depth, mask ? mask->data() : nullptr); !walk.done(); walk.next(shape)) {
    steps.append(py::make_tuple(walk.first, walk.tap_y, walk.tap_x));
  }
  return steps;
}

// Of an operand: (line, depth) of all elements that `thread` stages, with `width` neighbours at a time along the depth,
// or along the lines with width 0.
py::list stage_places(int thread, int width) {
  using bdprune::core::kConvDepth, bdprune::core::kConvRows, bdprune::core::kConvThreads;
  const auto place = [&](int turn) {
    switch (width) {
      case 8:
        return bdprune::core::stage_by_depth<8>(thread, turn);
      case 4:
        return bdprune::core::stage_by_depth<4>(thread, turn);
      default:
        return bdprune::core::stage_by_line(thread, turn);
    }
  };
  const int each = std::max(width, 1);
  py::list places;
  for (int turn = 0; turn < kConvRows * kConvDepth / kConvThreads / each; ++turn) {
    for (int i = 0; i < each; ++i) places.append(py::make_tuple(place(turn).line, place(turn).depth + i));
  }
  return places;
}

// For each block (row tile, column tile) of an input gradient: (split, rows from, to, channels from, to) of its sum.
py::list mask_shares(int64_t rows, int64_t channels, int64_t row_tiles, int64_t column_tiles) {
  const bdprune::core::MaskSplit split(rows, channels, row_tiles, column_tiles);
  py::list shares;
  for (int64_t row = 0; row < row_tiles; ++row) {
    const int64_t own = split.of(row);
    for (int64_t column = 0; own >= 0 && column < column_tiles; ++column) {
      shares.append(py::make_tuple(own, own * split.rows_each, std::min(rows, (own + 1) * split.rows_each),
                                   std::min(channels, column * split.channels_each),
                                   std::min(channels, (column + 1) * split.channels_each)));
    }
  }
  return shares;
}

py::list fragment_places(const std::string& which, int lane) {
  using bdprune::core::Place;
  const std::pair<int, Place (*)(int, int)> fragment = which == "a8"    ? std::pair(4, bdprune::core::a_place_k8)
                                                       : which == "b8"  ? std::pair(2, bdprune::core::b_place_k8)
                                                       : which == "a16" ? std::pair(8, bdprune::core::a_place_k16)
                                                       : which == "b16" ? std::pair(4, bdprune::core::b_place_k16)
                                                                        : std::pair(4, bdprune::core::c_place);
  py::list places;
  for (int i = 0; i < fragment.first; ++i) {
    const Place place = fragment.second(lane, i);
    places.append(py::make_tuple(place.row, place.column));
  }
  return places;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The torch-free core of bdprune on NumPy arrays.";
  m.def("isa", [] { return bdprune::core::isa_name(bdprune::core::isa()); }, "Instruction set the kernels run on.");
  m.def("spectral_norms", &spectral_norms, py::arg("weights"), py::arg("dtype"), py::arg("count"), py::arg("rows"),
        py::arg("cols"),
        "Largest singular value of each of `count` row-major [rows, cols] matrices in a contiguous buffer -> float64.");
  m.def("channel_moments", &channel_moments, py::arg("x"), py::arg("shift"), py::arg("channels_fastest") = false,
        "Cross moments, sums and norm sums of a float32 feature map around `shift` -> (cross, sum, norm_sum).");
  m.def("conv_sources", &conv_sources, py::arg("size"), py::arg("out_size"), py::arg("kernel"), py::arg("stride"),
        py::arg("pad"), py::arg("dilation"), py::arg("tap"), py::arg("gradient"),
        "Position that a tap reads for every position of the output (of the input, for its gradient), or -1.");
  m.def("conv_tile", &conv_tile, py::arg("block"), py::arg("row_tiles"), py::arg("column_tiles"), py::arg("groups"),
        "(map, group, column tile, row tile) of a block.");
  m.def("conv_walk", &conv_walk, py::arg("kernel"), py::arg("depth"), py::arg("mask") = py::none(),
        "(first channel, tap row, tap column) of each step of a tile; chunks of zero mask are left out.");
  m.def("stage_places", &stage_places, py::arg("thread"), py::arg("width"),
        "(line, depth) of each element of an operand that a thread stages: `width` at a time, or 0 for by lines.");
  m.def("mask_shares", &mask_shares, py::arg("rows"), py::arg("channels"), py::arg("row_tiles"),
        py::arg("column_tiles"), "(split, rows from, to, channels from, to) of each block that sums for the mask.");
  m.def("fragment_places", &fragment_places, py::arg("which"), py::arg("lane"),
        "(row, column) of each element of a lane's fragment: a8, b8 (TF32), a16, b16 (16-bit) or c.");
  m.def("round_to_tf32", &bdprune::core::round_to_tf32, py::arg("bits"), "The bits of a float32 rounded to TF32.");
  m.def("jacobi_largest", &jacobi_largest, py::arg("matrix"), py::arg("sweeps") = 0,
        "Largest eigenvalue of a symmetric positive semidefinite matrix by cyclic Jacobi (0: the default sweeps).");
  m.def("jacobi_schedule", &jacobi_schedule, py::arg("n"), "Pairs of each step of one sweep.");
  m.def("tridiagonal_largest", &tridiagonal_largest, py::arg("matrix"),
        "Largest eigenvalue of a symmetric positive semidefinite matrix by tridiagonalisation and bisection.");
}
