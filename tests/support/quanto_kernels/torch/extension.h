// What the kernels need of torch's header of this name, without the modules, optimizers and data loaders of its C++ API.
#pragma once
#include <torch/csrc/utils/pybind.h>
#include <torch/types.h>
