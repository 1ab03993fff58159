#!/bin/sh
# Check and measure the package on a machine with one GPU, as `benchmarks/gpu.py` says. It needs torch, Triton,
# transformers >= 5.17 and accelerate; nothing of this repository has to be installed. --small runs it on the CPU.
set -eu
cd "$(dirname "$0")/.."
# cuDNN plans attention anew for each length; torch reads this before its first attention.
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1 PYTHONUNBUFFERED=1
if [ -n "${OUT:-}" ]; then set -- --folder "$OUT" "$@"; fi
for option in "$@"; do
    if [ "$option" = --small ]; then export TRITON_INTERPRET=1; fi
done
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
