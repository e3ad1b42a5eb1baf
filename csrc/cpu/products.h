// Whether the single-threaded products of packing.h run on this processor.
#pragma once

#include <c10/core/ScalarType.h>

namespace illada {

bool has_cpu_products(at::ScalarType dtype);

}  // namespace illada
