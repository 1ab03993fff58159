// quanto's kernels for the CPU as one source instead of two: reading torch's headers, which both of them include, takes
// nearly all of the time. Compiled by the fixture `quanto_kernels` of tests/conftest.py.
#include "unpack.cpp"
#include "pybind_module.cpp"
