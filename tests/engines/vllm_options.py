"""How vLLM is started for the tests, on a CPU and for the demo model, and what its answers begin with."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .servers import HOST, Server, free_port, running

MODEL = "demo"

OPTIONS = (
    *("--host", HOST, "--dtype", "float32", "--max-model-len", "2048"),
    # Starts in half the time; and other memory of the machine may be in use.
    *("--enforce-eager", "--gpu-memory-utilization", "0.3"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "mistral", "--exclude-tools-when-tool-choice-none"),
    # The demo model would fill the free space of a JSON text without end.
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
# vLLM decodes an answer behind its prompt, so that the space of the format between them is part of the answer's text.
SPACE = " "


@contextmanager
def serving(
    name: str,
    folder: Path,
    log_file: Path,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    *,
    is_by_us: bool = False,
) -> Iterator[Server]:
    port = free_port()
    scripts = Path(sys.executable).parent
    program = (
        [str(scripts / "mistral-large"), "serve", "--engine", "vllm"] if is_by_us else [str(scripts / "vllm"), "serve"]
    )
    command = [*program, str(folder), "--served-model-name", MODEL, *OPTIONS, "--port", str(port), *options]
    environment = ENVIRONMENT | dict(environment or {})
    with running(name, command, port=port, log_file=log_file, environment=environment) as server:
        yield server
