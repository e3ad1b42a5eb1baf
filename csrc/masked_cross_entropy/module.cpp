// Makes the shared library importable as illada_megatron.ops._kernels: importing it registers the operators.
#include <Python.h>

// WITHOUT_CUDA: why the CUDA part was left out of this build, "" where it was not (setup.py)
// CUDA_ARCHITECTURES: what it was built for, in the words of TORCH_CUDA_ARCH_LIST
PyMODINIT_FUNC PyInit__kernels() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", "Operators of torch.ops.illada.", -1, nullptr};
  PyObject* made = PyModule_Create(&module);
  if (made && PyModule_AddStringConstant(made, "without_cuda", WITHOUT_CUDA) < 0) Py_CLEAR(made);
  if (made && PyModule_AddStringConstant(made, "cuda_architectures", CUDA_ARCHITECTURES) < 0) Py_CLEAR(made);
  return made;
}
