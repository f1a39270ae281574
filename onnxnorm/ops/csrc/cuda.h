// The operators on a GPU's memory, and what of it this library was built with.
#pragma once

#include "operators.h"

namespace onnxnorm::cuda {

// Launches the operator on `stream` and returns; it may still run. Errors of launching are thrown.
void run(const SoftmaxCall& call, void* stream);
void run(const NormCall& call, void* stream);

}  // namespace onnxnorm::cuda
