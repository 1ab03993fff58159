"""Interpreters in which other people's modules are imported already, and neither transformers nor ours.

What a test of imports waits for is torch, which takes longer than all else. Each program runs in a fork of one
interpreter that has imported what it is told to, so that transformers and our packages are imported anew every time.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
NEVER = ("transformers", "modeling_mistral_large", "mistral_large_conversion", "mistral_large_cli")


class CleanForks:
    """Runs programs one by one."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process, self._folder = process, folder

    def run(self, code: str, *, cwd: Path, path: Path) -> str:
        """Run `code` in `cwd`, `path` first among its import paths; return what it prints."""
        outputs = [self._folder / name for name in ("stdout", "stderr")]
        request = {"code": code, "cwd": str(cwd), "path": str(path), "outputs": list(map(str, outputs))}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        status = self._process.stdout.readline()
        printed, said = (output.read_text() for output in outputs)
        assert status == "0\n", said
        return printed


@contextmanager
def start(modules: Iterable[str]) -> Iterator[CleanForks]:
    """Start an interpreter that imports these modules, but for transformers and ours."""
    with TemporaryDirectory() as name:
        # The program alone, so that no folder of this repository is among the import paths.
        code = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=name,
            env={**os.environ, "PYTHONPATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        try:
            print(json.dumps(sorted(modules)), file=process.stdin, flush=True)
            yield CleanForks(process, Path(name))
        finally:
            process.stdin.close()
            process.wait()


def serve() -> None:
    for name in json.loads(sys.stdin.readline()):
        if name != "__main__" and name.split(".")[0] not in NEVER:
            # Some are names that other modules have put there.
            with suppress(Exception):
                importlib.import_module(name)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(request: dict[str, Any]) -> None:
    """Do what `python -c` does with this code, and end."""
    for target, output in enumerate(request["outputs"], start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
    assert not {name.split(".")[0] for name in sys.modules} & {*NEVER}
    os.chdir(request["cwd"])
    sys.path[:1] = ["", request["path"]]
    code = 0
    try:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
