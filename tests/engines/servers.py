"""A server of an engine as a process: started, waited for, and always stopped with all of its children."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

HOST = "127.0.0.1"
START_SECONDS = 300
STOP_SECONDS = 30
SHOWN_LOG_CHARACTERS = 6000


@dataclass(frozen=True)
class Server:
    """A running server: what it was started for, its address and its log."""

    name: str
    port: int
    log_file: Path

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def log(self) -> str:
        """The end of what it has printed."""
        return self.log_file.read_text(errors="replace")[-SHOWN_LOG_CHARACTERS:]


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    name: str, command: Sequence[str], *, port: int, log_file: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run `command`, which must listen on `port`, until the context ends.

    Raises:
        RuntimeError: it ended, or did not answer within START_SECONDS; with the end of its log.
    """
    server = Server(name, port, log_file)
    # Nothing here may be fetched, or answered by a proxy.
    offline = {"HF_HUB_OFFLINE": "1", "NO_PROXY": HOST, "no_proxy": HOST}
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **offline, **(environment or {})},
            # A process group of its own: engines have workers, which would outlive them.
            start_new_session=True,
        )
    try:
        wait_until_healthy(server, process)
        yield server
    finally:
        _stop(process)


def wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Wait for a server that has just been started; RuntimeError as in `running`."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{server.name}: ended with exit code {process.returncode}:\n{server.log()}")
        with suppress(URLError, ConnectionError, TimeoutError), urlopen(f"{server.url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise RuntimeError(f"{server.name}: no answer within {START_SECONDS} s:\n{server.log()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    # What is left of the group, also when the server itself ended in time.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
