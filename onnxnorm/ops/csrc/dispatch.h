// Which instruction set the kernels use on this processor.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace onnxnorm {

// Instruction sets that were built and that this processor has, the best first.
std::vector<const Kernels*> usable_kernels();

// Instruction sets that were built, the best first.
std::vector<std::string> built_kernels();

// The best one, or the one that ONNXNORM_INSTRUCTION_SET or `select_kernels` names.
const Kernels& kernels();

// Use this one from now on, in the whole process; false where it is not usable. For tests.
bool select_kernels(const std::string& name);

}  // namespace onnxnorm
