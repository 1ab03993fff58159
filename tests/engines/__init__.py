"""Real engines on our checkpoints, each in an environment of its own: `.ci/vllm`, `.ci/serve`."""
