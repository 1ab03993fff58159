#!/bin/sh
# Measure the full geometry on a machine with one GPU of 141 GB, as `benchmarks/gpu.py` says. It needs torch,
# transformers >= 5.17 and accelerate; nothing of this repository has to be installed.
set -eu
cd "$(dirname "$0")/.."
PYTHONPATH=. exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
