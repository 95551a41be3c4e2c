// References, arguments and NumPy arrays over CPython's limited API (3.11), so that one module serves every later
// Python. C++ exceptions become Python errors.
#pragma once

#undef Py_LIMITED_API  // torch's build sets the oldest Python that torch supports; 3.11 brought the buffer protocol
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace bdprune::binding {

// Thrown where the interpreter has set the error.
struct ErrorIsSet {};

// Throws what Python sees as a ValueError.
inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

// Owns one reference.
class Ref {
 public:
  explicit Ref(PyObject* object) : object_(object) {
    if (!object_) throw ErrorIsSet{};
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&&) = delete;
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// The memory of an object, held in place until the view goes.
class View {
 public:
  explicit View(PyObject* object, int flags = PyBUF_STRIDES) {
    if (PyObject_GetBuffer(object, &view_, flags) < 0) throw ErrorIsSet{};
  }
  View(const View&) = delete;  // a buffer may point into itself
  View& operator=(const View&) = delete;
  ~View() { PyBuffer_Release(&view_); }

  void* data() const { return view_.buf; }
  Py_ssize_t bytes() const { return view_.len; }
  bool is_contiguous() const { return PyBuffer_IsContiguous(&view_, 'C'); }
  int ndim() const { return view_.ndim; }
  Py_ssize_t shape(int axis) const { return view_.shape[axis]; }

 private:
  Py_buffer view_;
};

// A C-contiguous, aligned NumPy array.
template <typename T>
class Array {
 public:
  // The values of `object` as such an array; it is converted if it is of another kind.
  static Array of(PyObject* object) {
    return Array(Ref(PyObject_CallMethod(numpy().get(), "require", "Oss", object, dtype(), "CA")), PyBUF_STRIDES);
  }

  static Array zeros(std::initializer_list<Py_ssize_t> shape) {
    Ref sizes(PyTuple_New(static_cast<Py_ssize_t>(shape.size())));
    Py_ssize_t axis = 0;
    for (const Py_ssize_t size : shape) {
      if (PyTuple_SetItem(sizes.get(), axis++, Ref(PyLong_FromSsize_t(size)).release()) < 0) throw ErrorIsSet{};
    }
    return Array(Ref(PyObject_CallMethod(numpy().get(), "zeros", "Os", sizes.get(), dtype())),
                 PyBUF_STRIDES | PyBUF_WRITABLE);
  }

  T* data() const { return static_cast<T*>(view_.data()); }
  int64_t size() const { return view_.bytes() / static_cast<Py_ssize_t>(sizeof(T)); }
  int ndim() const { return view_.ndim(); }
  Py_ssize_t shape(int axis) const { return view_.shape(axis); }
  PyObject* object() const { return object_.get(); }

 private:
  Array(Ref object, int flags) : object_(std::move(object)), view_(object_.get(), flags) {}

  static Ref numpy() { return Ref(PyImport_ImportModule("numpy")); }

  static constexpr const char* dtype() {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, int64_t>);
    return std::is_same_v<T, float> ? "float32" : std::is_same_v<T, double> ? "float64" : "int64";
  }

  Ref object_;
  View view_;
};

// Other Python threads run while it lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

struct Arguments {
  PyObject* positional;
  PyObject* named;

  // The format is that of PyArg_ParseTupleAndKeywords; the names end with a null pointer.
  template <size_t kNames, typename... Targets>
  void parse(const char* format, const char* const (&names)[kNames], Targets*... targets) const {
    if (!PyArg_ParseTupleAndKeywords(positional, named, format, const_cast<char**>(names), targets...))
      throw ErrorIsSet{};
  }
};

inline void append(const Ref& list, PyObject* item) {
  const Ref owned(item);
  if (PyList_Append(list.get(), owned.get()) < 0) throw ErrorIsSet{};
}

// A function as Python calls it: what it throws becomes the Python error.
template <PyObject* (*kFunction)(const Arguments&)>
PyObject* guarded(PyObject* /*module*/, PyObject* positional, PyObject* named) noexcept {
  try {
    return kFunction({positional, named});
  } catch (const ErrorIsSet&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <PyObject* (*kFunction)(const Arguments&)>
PyMethodDef method(const char* name, const char* doc) {
  // The interpreter casts it back before it calls it, as METH_KEYWORDS says.
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&guarded<kFunction>));
  return {name, function, METH_VARARGS | METH_KEYWORDS, doc};
}

}  // namespace bdprune::binding
