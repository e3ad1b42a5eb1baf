// Makes the shared library importable as illada_megatron.ops._kernels: importing it registers the operators.
#include <Python.h>

PyMODINIT_FUNC PyInit__kernels() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", "Operators of torch.ops.illada.", -1, nullptr};
  return PyModule_Create(&module);
}
