// The Python module illada_megatron.data.shards._indexed_dataset.
#include "bindings.h"

#include <exception>

#include "errors.h"

namespace py = pybind11;

PYBIND11_MODULE(_indexed_dataset, module) {
  module.doc() = "Megatron's MMIDIDX shards in C++; use it through illada_megatron.data.";
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const illada::DiskError& error) {
      // OSError(errno, strerror, filename): Python picks the subclass (PermissionError, ...)
      const py::tuple arguments = py::make_tuple(error.code().value(), error.code().message(), error.path());
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    } catch (const illada::DataError& error) {
      const py::object type = py::module_::import("illada_megatron.data.errors").attr("DataError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });
  illada::BindWriting(module);
  illada::BindReading(module);
}
