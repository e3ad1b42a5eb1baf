// The few types of the CUDA runtime that kernels' declarations use, for tests/simt.
#pragma once

#include "machine.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;
