// csrc/core on NumPy arrays, without torch: bdprune.screen and the tests of the core call it.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "binding.h"
#include "core/channel_moments.h"
#include "core/filter_spectral_norms.h"
#include "core/implicit_gemm.h"
#include "core/isa.h"
#include "core/jacobi.h"
#include "core/tridiagonal.h"

namespace {

using bdprune::binding::append;
using bdprune::binding::Arguments;
using bdprune::binding::Array;
using bdprune::binding::method;
using bdprune::binding::Ref;
using bdprune::binding::require;
using bdprune::binding::View;
using bdprune::core::Dtype;
using bdprune::core::FilterBank;
using bdprune::core::kBatch;

// Memory aligned to 64 bytes.
struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

std::unique_ptr<void, Free> allocate(int64_t bytes) {
  return std::unique_ptr<void, Free>(::operator new(static_cast<size_t>(bytes), std::align_val_t(64)));
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kFloat;
  if (name == "float64") return Dtype::kDouble;
  if (name == "float16") return Dtype::kHalf;
  if (name == "bfloat16") return Dtype::kBFloat16;
  throw std::invalid_argument("dtype must be float16, bfloat16, float32 or float64, not " + name);
}

// The bank in the buffer, whose size, layout and alignment are checked.
FilterBank filter_bank(const View& weights, const std::string& dtype, int64_t count, int64_t rows, int64_t cols) {
  const FilterBank bank{weights.data(), dtype_of(dtype), count, rows, cols};
  const int64_t item = bank.dtype == Dtype::kDouble ? 8 : bank.dtype == Dtype::kFloat ? 4 : 2;
  require(count >= 0 && rows >= 0 && cols >= 0, "sizes must not be negative");
  int64_t needed = item;
  for (const int64_t size : {count, rows, cols}) {
    require(!__builtin_mul_overflow(needed, size, &needed), "sizes are too large");
  }
  if (needed != weights.bytes())
    throw std::invalid_argument("the buffer holds " + std::to_string(weights.bytes()) + " bytes, " +
                                std::to_string(needed) + " are needed");
  require(weights.is_contiguous(), "the buffer must be C-contiguous");
  require(reinterpret_cast<uintptr_t>(weights.data()) % static_cast<uintptr_t>(item) == 0 || needed == 0,
          "the buffer must be aligned to its elements");
  return bank;
}

PyObject* spectral_norms(const Arguments& arguments) {
  PyObject* weights = nullptr;
  const char* dtype = nullptr;
  Py_ssize_t count = 0, rows = 0, cols = 0;
  arguments.parse("Osnnn:spectral_norms", {"weights", "dtype", "count", "rows", "cols", nullptr}, &weights, &dtype,
                  &count, &rows, &cols);
  const View view(weights);
  const FilterBank bank = filter_bank(view, dtype, count, rows, cols);
  const auto result = Array<double>::zeros({count});
  {
    const bdprune::binding::WithoutGil released;
    const auto scratch = allocate(bdprune::core::spectral_scratch(bank) * static_cast<int64_t>(sizeof(double)));
    double norms[kBatch];
    for (int64_t batch = 0; batch < bank.batches(); ++batch) {
      bdprune::core::spectral_norms(bank, batch, static_cast<double*>(scratch.get()), norms);
      std::copy_n(norms, std::min<int64_t>(kBatch, count - batch * kBatch), result.data() + batch * kBatch);
    }
  }
  return Py_NewRef(result.object());
}

// Sums of one feature map [samples, channels, positions] (or [samples, positions, channels]) around `shift`.
PyObject* channel_moments(const Arguments& arguments) {
  PyObject *x_object = nullptr, *shift_object = nullptr;
  int channels_fastest = 0;
  arguments.parse("OO|p:channel_moments", {"x", "shift", "channels_fastest", nullptr}, &x_object, &shift_object,
                  &channels_fastest);
  const auto x = Array<float>::of(x_object);
  const auto shift = Array<double>::of(shift_object);
  if (x.ndim() != 3) throw std::invalid_argument("x must have 3 dimensions, not " + std::to_string(x.ndim()));
  const Py_ssize_t channels = x.shape(channels_fastest ? 2 : 1), positions = x.shape(channels_fastest ? 1 : 2);
  require(shift.ndim() == 1 && shift.shape(0) == channels, "shift must have one value per channel");
  const bdprune::core::FeatureView view{x.data(), Dtype::kFloat, x.shape(0), channels, positions, channels_fastest > 0};
  const auto cross = Array<double>::zeros({channels, channels});
  const auto sum = Array<double>::zeros({channels});
  const auto norm_sum = Array<double>::zeros({channels});
  const auto squares = Array<double>::zeros({channels});
  const int64_t bytes = bdprune::core::moment_buffer_bytes(view);
  const auto buffer = allocate(bytes);
  std::fill_n(static_cast<char*>(buffer.get()), bytes, 0);
  const bdprune::core::MomentState state{sum.data(), norm_sum.data(), squares.data()};
  const int64_t total = x.shape(0) * positions;
  for (int64_t start = 0; start < total; start += bdprune::core::kChunk) {
    const int64_t count = std::min(bdprune::core::kChunk, total - start);
    bdprune::core::pack_moments(view, shift.data(), start, count, 0, view.octets(), buffer.get(), state);
    bdprune::core::cross_moments(view, count, 0, bdprune::core::moment_pairs(view), buffer.get(), cross.data());
  }
  for (Py_ssize_t i = 0; i < channels; ++i) {
    for (Py_ssize_t j = 0; j < i; ++j) cross.data()[i * channels + j] = cross.data()[j * channels + i];
  }
  return Py_BuildValue("(OOO)", cross.object(), sum.object(), norm_sum.object());
}

// A copy of the values of a matrix, for a solver to overwrite, and its side.
struct Square {
  explicit Square(PyObject* object) {
    const auto matrix = Array<double>::of(object);
    require(matrix.ndim() == 2 && matrix.shape(0) == matrix.shape(1) && matrix.size() > 0,
            "expected a non-empty square matrix");
    side = static_cast<int>(matrix.shape(0));
    values.assign(matrix.data(), matrix.data() + matrix.size());
  }

  int side;
  std::vector<double> values;
};

PyObject* jacobi_largest(const Arguments& arguments) {
  PyObject* matrix = nullptr;
  int sweeps = 0;
  arguments.parse("O|i:jacobi_largest", {"matrix", "sweeps", nullptr}, &matrix, &sweeps);
  Square a(matrix);
  return PyFloat_FromDouble(bdprune::core::jacobi_largest(a.values.data(), a.side,
                                                          sweeps > 0 ? sweeps : bdprune::core::jacobi_sweeps(a.side)));
}

PyObject* tridiagonal_largest(const Arguments& arguments) {
  PyObject* matrix = nullptr;
  arguments.parse("O:tridiagonal_largest", {"matrix", nullptr}, &matrix);
  Square a(matrix);
  std::vector<double> work(3 * static_cast<size_t>(a.side));
  return PyFloat_FromDouble(bdprune::core::largest_eigenvalue(a.values.data(), a.side, work.data()));
}

// What follows shows the tests the index logic of the kernels. Sizes up to this keep its arithmetic within int.
constexpr int64_t kMostForTests = 1 << 14;

void check(int64_t least, std::initializer_list<int64_t> values) {
  for (const int64_t value : values) {
    if (value < least || value > kMostForTests)
      throw std::invalid_argument("expected a whole number from " + std::to_string(least) + " to " +
                                  std::to_string(kMostForTests) + ", not " + std::to_string(value));
  }
}

PyObject* jacobi_schedule(const Arguments& arguments) {
  int n = 0;
  arguments.parse("i:jacobi_schedule", {"n", nullptr}, &n);
  check(1, {n});
  Ref steps(PyList_New(0));
  for (int step = 0; step < bdprune::core::jacobi_steps(n); ++step) {
    Ref pairs(PyList_New(0));
    for (int i = 0; i < bdprune::core::jacobi_pairs(n); ++i) {
      const auto pair = bdprune::core::jacobi_pair(n, step, i);
      append(pairs, Py_BuildValue("(ii)", pair.p, pair.q));
    }
    append(steps, pairs.release());
  }
  return steps.release();
}

// Where a tap reads: for each position of the map that the rows run over, that of the other map, or -1.
PyObject* conv_sources(const Arguments& arguments) {
  bdprune::core::ConvShape s{};
  int tap_y = 0, tap_x = 0, gradient = 0;
  arguments.parse("(ii)(ii)(ii)(ii)(ii)(ii)(ii)p:conv_sources",
                  {"size", "out_size", "kernel", "stride", "pad", "dilation", "tap", "gradient", nullptr}, &s.height,
                  &s.width, &s.out_height, &s.out_width, &s.kernel_height, &s.kernel_width, &s.stride_height,
                  &s.stride_width, &s.pad_height, &s.pad_width, &s.dilation_height, &s.dilation_width, &tap_y, &tap_x,
                  &gradient);
  check(1, {s.height, s.width, s.out_height, s.out_width, s.kernel_height, s.kernel_width});
  check(1, {s.stride_height, s.stride_width, s.dilation_height, s.dilation_width});
  check(0, {s.pad_height, s.pad_width, tap_y, tap_x});
  const int height = gradient ? s.height : s.out_height, width = gradient ? s.width : s.out_width;
  const auto sources = Array<int64_t>::zeros({height, width});
  int64_t* to = sources.data();
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      *to++ = gradient ? bdprune::core::source_position<true>(s, y, x, tap_y, tap_x)
                       : bdprune::core::source_position<false>(s, y, x, tap_y, tap_x);
    }
  }
  return Py_NewRef(sources.object());
}

PyObject* conv_tile(const Arguments& arguments) {
  long long block = 0, row_tiles = 0, column_tiles = 0, groups = 0;
  arguments.parse("LLLL:conv_tile", {"block", "row_tiles", "column_tiles", "groups", nullptr}, &block, &row_tiles,
                  &column_tiles, &groups);
  require(block >= 0, "block must not be negative");
  check(1, {row_tiles, column_tiles, groups});
  const auto tile = bdprune::core::conv_tile(block, row_tiles, column_tiles, groups);
  return Py_BuildValue("(LLLL)", tile.map, tile.group, tile.column_tile, tile.row_tile);
}

PyObject* conv_walk(const Arguments& arguments) {
  bdprune::core::ConvShape shape{};
  long long depth = 0;
  PyObject* mask_object = Py_None;
  arguments.parse("(ii)L|O:conv_walk", {"kernel", "depth", "mask", nullptr}, &shape.kernel_height, &shape.kernel_width,
                  &depth, &mask_object);
  check(1, {shape.kernel_height, shape.kernel_width, depth});
  const bool masked = mask_object != Py_None;
  const auto mask = masked ? Array<float>::of(mask_object) : Array<float>::zeros({depth});
  require(mask.ndim() == 1 && mask.size() == depth, "mask must have one value per channel");
  Ref steps(PyList_New(0));
  for (bdprune::core::ConvWalk walk(depth, masked ? mask.data() : nullptr); !walk.done(); walk.next(shape)) {
    append(steps, Py_BuildValue("(Lii)", walk.first, walk.tap_y, walk.tap_x));
  }
  return steps.release();
}

// (line, depth) of all elements of an operand that `thread` stages, with `width` neighbours at a time along the depth,
// or along the lines with width 0.
PyObject* stage_places(const Arguments& arguments) {
  using bdprune::core::kConvDepth, bdprune::core::kConvRows, bdprune::core::kConvThreads;
  int thread = 0, width = 0;
  arguments.parse("ii:stage_places", {"thread", "width", nullptr}, &thread, &width);
  check(0, {thread});
  require(width == 0 || width == 4 || width == 8, "width must be 0, 4 or 8");
  const int each = std::max(width, 1);
  Ref places(PyList_New(0));
  for (int turn = 0; turn < kConvRows * kConvDepth / kConvThreads / each; ++turn) {
    const auto place = width == 8   ? bdprune::core::stage_by_depth<8>(thread, turn)
                       : width == 4 ? bdprune::core::stage_by_depth<4>(thread, turn)
                                    : bdprune::core::stage_by_line(thread, turn);
    for (int i = 0; i < each; ++i) append(places, Py_BuildValue("(ii)", place.line, place.depth + i));
  }
  return places.release();
}

// For each block (row tile, column tile) of an input gradient: (split, rows from, to, channels from, to) of its sum.
PyObject* mask_shares(const Arguments& arguments) {
  long long rows = 0, channels = 0, row_tiles = 0, column_tiles = 0;
  arguments.parse("LLLL:mask_shares", {"rows", "channels", "row_tiles", "column_tiles", nullptr}, &rows, &channels,
                  &row_tiles, &column_tiles);
  check(1, {rows, channels, row_tiles, column_tiles});
  const bdprune::core::MaskSplit split(rows, channels, row_tiles, column_tiles);
  Ref shares(PyList_New(0));
  for (int64_t row = 0; row < row_tiles; ++row) {
    const int64_t own = split.of(row);
    for (int64_t column = 0; own >= 0 && column < column_tiles; ++column) {
      append(shares,
             Py_BuildValue("(LLLLL)", own, own * split.rows_each, std::min<int64_t>(rows, (own + 1) * split.rows_each),
                           std::min<int64_t>(channels, column * split.channels_each),
                           std::min<int64_t>(channels, (column + 1) * split.channels_each)));
    }
  }
  return shares.release();
}

PyObject* fragment_places(const Arguments& arguments) {
  const struct {
    std::string name;
    int elements;
    bdprune::core::Place (*place)(int, int);
  } fragments[] = {{"a8", 4, bdprune::core::a_place_k8},
                   {"b8", 2, bdprune::core::b_place_k8},
                   {"a16", 8, bdprune::core::a_place_k16},
                   {"b16", 4, bdprune::core::b_place_k16},
                   {"c", 4, bdprune::core::c_place}};
  const char* which = nullptr;
  int lane = 0;
  arguments.parse("si:fragment_places", {"which", "lane", nullptr}, &which, &lane);
  check(0, {lane});
  for (const auto& fragment : fragments) {
    if (fragment.name != which) continue;
    Ref places(PyList_New(0));
    for (int i = 0; i < fragment.elements; ++i) {
      const auto place = fragment.place(lane, i);
      append(places, Py_BuildValue("(ii)", place.row, place.column));
    }
    return places.release();
  }
  throw std::invalid_argument(std::string("which must be a8, b8, a16, b16 or c, not ") + which);
}

PyObject* round_to_tf32(const Arguments& arguments) {
  long long bits = 0;
  arguments.parse("L:round_to_tf32", {"bits", nullptr}, &bits);
  require(bits >= 0 && bits <= UINT32_MAX, "bits must be those of a float32");
  return PyLong_FromUnsignedLong(bdprune::core::round_to_tf32(static_cast<uint32_t>(bits)));
}

PyObject* isa(const Arguments& arguments) {
  arguments.parse(":isa", {nullptr});
  return PyUnicode_FromString(bdprune::core::isa_name(bdprune::core::isa()));
}

PyMethodDef kMethods[] = {
    method<isa>("isa", "isa($module)\n--\n\nInstruction set the kernels run on."),
    method<spectral_norms>("spectral_norms",
                           "spectral_norms($module, weights, dtype, count, rows, cols)\n--\n\n"
                           "Largest singular value of each of `count` row-major [rows, cols] matrices in a contiguous "
                           "buffer -> float64."),
    method<channel_moments>("channel_moments",
                            "channel_moments($module, x, shift, channels_fastest=False)\n--\n\n"
                            "Cross moments, sums and norm sums of a float32 feature map around `shift` -> (cross, sum, "
                            "norm_sum)."),
    method<conv_sources>("conv_sources",
                         "conv_sources($module, size, out_size, kernel, stride, pad, dilation, tap, gradient)\n--\n\n"
                         "Position that a tap reads for every position of the output (of the input, for its gradient), "
                         "or -1."),
    method<conv_tile>("conv_tile",
                      "conv_tile($module, block, row_tiles, column_tiles, groups)\n--\n\n"
                      "(map, group, column tile, row tile) of a block."),
    method<conv_walk>("conv_walk",
                      "conv_walk($module, kernel, depth, mask=None)\n--\n\n"
                      "(first channel, tap row, tap column) of each step of a tile; chunks of zero mask are left out."),
    method<stage_places>("stage_places",
                         "stage_places($module, thread, width)\n--\n\n"
                         "(line, depth) of each element of an operand that a thread stages: `width` at a time, or 0 "
                         "for by lines."),
    method<mask_shares>("mask_shares",
                        "mask_shares($module, rows, channels, row_tiles, column_tiles)\n--\n\n"
                        "(split, rows from, to, channels from, to) of each block that sums for the mask."),
    method<fragment_places>("fragment_places",
                            "fragment_places($module, which, lane)\n--\n\n"
                            "(row, column) of each element of a lane's fragment: a8, b8 (TF32), a16, b16 (16-bit) or "
                            "c."),
    method<round_to_tf32>("round_to_tf32",
                          "round_to_tf32($module, bits)\n--\n\nThe bits of a float32 rounded to TF32."),
    method<jacobi_largest>("jacobi_largest",
                           "jacobi_largest($module, matrix, sweeps=0)\n--\n\n"
                           "Largest eigenvalue of a symmetric positive semidefinite matrix by cyclic Jacobi (0: the "
                           "default sweeps)."),
    method<jacobi_schedule>("jacobi_schedule", "jacobi_schedule($module, n)\n--\n\nPairs of each step of one sweep."),
    method<tridiagonal_largest>("tridiagonal_largest",
                                "tridiagonal_largest($module, matrix)\n--\n\n"
                                "Largest eigenvalue of a symmetric positive semidefinite matrix by tridiagonalisation "
                                "and bisection."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit__core(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_core",
                                   "csrc/core on NumPy arrays, without torch.",
                                   0,
                                   kMethods,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModuleDef_Init(&definition);
}
