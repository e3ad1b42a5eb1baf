// The parts of the Python module, one function a file.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace illada {

// Takes what numpy casts safely (never floating point to integers) and makes it contiguous.
template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

void BindWriting(pybind11::module_& module);
void BindReading(pybind11::module_& module);

}  // namespace illada
