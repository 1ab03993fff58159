"""A `python` whose processes start with torch and transformers imported: importing them takes 4 seconds, a fork none.

`start` begins a server that has imported both and nothing of ours, and makes the commands `python`, for `-c`, `-m` and
scripts, and `mistral-large`. Each run of one is a fork of the server with the caller's arguments, folder, environment
and standard streams. With other options of Python, or where the environment differs from the server's in what Python or
a library reads only when it starts, the command runs the real Python instead.
"""

import atexit
import gc
import io
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
# Variables that are read once, when Python starts or a library is imported.
PREFIXES = ("HF_", "LANG", "LC_", "MKL_", "OMP_", "PYTHON", "TRANSFORMERS_")
CLIENT = """
import json, os, socket, sys
arguments = sys.argv[2:] if sys.argv[1] == "-u" else sys.argv[1:]
is_known = not arguments[0].startswith("-") or arguments[0] in ("-c", "-m")
if not is_known or {{name: value for name, value in os.environ.items() if name.startswith({prefixes})}} != {known}:
    os.execv({python}, [{python}, *sys.argv[1:]])
connection = socket.socket(socket.AF_UNIX)
connection.connect({address})
request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(request)
code = int(connection.recv(16))
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@dataclass(frozen=True)
class WarmPython:
    """folder: holds the commands, and may be the first one in PATH. environment: the server's."""

    folder: Path
    environment: dict[str, str]

    @property
    def python(self) -> str:
        return str(self.folder / "python")

    def run_two_ranks(self, module: str, *arguments: object) -> None:
        """Run a module as two processes of torch.distributed, which must not fail."""
        launch = [self.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
        run = subprocess.run(
            [*launch, *map(str, arguments)],
            cwd=ROOT,
            env={**self.environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr


@contextmanager
def start() -> Iterator[WarmPython]:
    """Start a server that finds our packages in this checkout and asks no hub; end it, and all it has forked."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(folder / "modules"),
            "PYTHONPATH": str(ROOT),
            # What torchrun starts.
            "PYTHON_EXEC": str(folder / "python"),
        }
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "socket"))
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, "-c", "from tests.support.warm_python import serve; serve()", str(listener.fileno())],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        listener.close()
        try:
            write_commands(folder, environment)
            yield WarmPython(folder, environment)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.communicate()


def write_commands(folder: Path, environment: dict[str, str]) -> None:
    known = {name: value for name, value in environment.items() if name.startswith(PREFIXES)}
    values = {"address": str(folder / "socket"), "known": known, "prefixes": PREFIXES, "python": sys.executable}
    (folder / "client.py").write_text(CLIENT.format(**{name: repr(value) for name, value in values.items()}))
    begin = f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {shlex.quote(str(folder / 'client.py'))}"
    for command, arguments in (("python", ""), ("python3", ""), ("mistral-large", "-m mistral_large_cli")):
        (folder / command).write_text(f'{begin} {arguments} "$@"\n')
        (folder / command).chmod(0o755)


def serve() -> None:
    """Fork for each connection, until the process that holds the other end of standard input is gone."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: F401

    # The forks share what is there; a collection would copy it.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    answer(connection)
                    return


def answer(connection: socket.socket) -> None:
    """Run what is asked for in a fork of this one, and tell its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as stream:
        arguments, folder, environment = json.loads(stream.read(int.from_bytes(message, "big")))
    child = os.fork()
    if child == 0:
        connection.close()
        for target, descriptor in enumerate(streams):
            os.dup2(descriptor, target)
            os.close(descriptor)
        reopen_streams()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        os._exit(run(arguments))
    _, status = os.waitpid(child, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def reopen_streams() -> None:
    """Make the streams again, as their objects know whether the server's could seek."""
    for descriptor, name, mode in ((0, "stdin", "rb"), (1, "stdout", "wb"), (2, "stderr", "wb")):
        old, binary = getattr(sys, name), open(descriptor, mode, closefd=False)  # noqa: SIM115
        is_line_buffered = name == "stderr" or os.isatty(descriptor)
        new = io.TextIOWrapper(binary, old.encoding, old.errors, line_buffering=is_line_buffered)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def run(arguments: list[str]) -> int:
    """Do what `python` does with these arguments, and return its exit code.

    What it does at its end without taking everything apart, which would cost as much as the imports.
    """
    code = 0
    try:
        execute(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def execute(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[0] = ""
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
