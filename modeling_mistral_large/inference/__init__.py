"""Faster inference on one GPU: decoding steps recorded as a CUDA graph, on kernels of its own. Needs Triton."""
