// quanto's kernels for the CPU as one source instead of two, as reading torch's headers takes nearly all of the time.
// Compiled by the fixture `quanto_kernels` of tests/conftest.py.
#include "unpack.cpp"
#include "pybind_module.cpp"
