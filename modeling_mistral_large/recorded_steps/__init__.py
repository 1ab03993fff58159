"""Decoding steps that are recorded once as a CUDA graph, their cache, and `generate` that uses them by itself."""
