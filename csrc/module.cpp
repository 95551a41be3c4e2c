// The Python side of the op libraries: an empty module, so that importing it runs the static registrations.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>

#define BDP_CONCAT_(a, b) a##b
#define BDP_CONCAT(a, b) BDP_CONCAT_(a, b)
#define BDP_STRING_(a) #a
#define BDP_STRING(a) BDP_STRING_(a)

PyMODINIT_FUNC BDP_CONCAT(PyInit_, TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               BDP_STRING(TORCH_EXTENSION_NAME),
                               nullptr,
                               -1,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
