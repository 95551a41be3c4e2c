// The Python module of the op libraries. It has no functions: importing it runs the static registrations. It records
// its build versions; bdprune.ops._backend reports them if loading fails.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <torch/headeronly/version.h>

#include <Python.h>

// libstdc++ reads this variable of glibc 2.32 to count the owners of a shared_ptr without atomic operations in a
// process of one thread. A definition of our own, which always says "several threads", lets the module load on the
// older glibc that torch supports (2.28).
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

#define BDP_CONCAT_(a, b) a##b
#define BDP_CONCAT(a, b) BDP_CONCAT_(a, b)
#define BDP_STRING_(a) #a
#define BDP_STRING(a) BDP_STRING_(a)

PyMODINIT_FUNC BDP_CONCAT(PyInit_, TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   BDP_STRING(TORCH_EXTENSION_NAME),
                                   nullptr,
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  if (PyModule_AddStringConstant(module, "built_for_torch", TORCH_VERSION) < 0 ||
      PyModule_AddStringConstant(module, "compiler", __VERSION__) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
