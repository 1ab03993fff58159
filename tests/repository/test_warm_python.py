"""The quick processes of the tests differ from new ones in nothing but what is imported."""

import subprocess
from pathlib import Path

import pytest

from modeling_mistral_large import __version__
from tests.support.warm_python import WarmPython

SAY = """
import os, sys
print(sys.argv, sys.path[0] in ("", os.getcwd()), os.getcwd(), os.environ["WORD"], sys.stdin.read(), __name__)
print([name in sys.modules for name in ("torch", "transformers", "modeling_mistral_large")], file=sys.stderr)
sys.exit(3)
"""

pytestmark = pytest.mark.slow


def run(warm: WarmPython, *arguments: str, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {**warm.environment, "WORD": "word", **variables}
    command = [warm.python, *arguments]
    return subprocess.run(command, input="é", cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_a_process_has_the_callers_arguments_folder_environment_and_streams(
    warm_python: WarmPython, tmp_path: Path
) -> None:
    (tmp_path / "say.py").write_text(SAY)
    for arguments in (("-c", SAY, "one", "two words"), ("say.py", "one", "two words")):
        done = run(warm_python, *arguments, cwd=tmp_path)
        argv = [arguments[0], "one", "two words"]
        assert done.stdout == f"{argv} True {tmp_path} word é __main__\n"
        assert (done.stderr, done.returncode) == ("[True, True, False]\n", 3)
    done = run(warm_python, "-m", "say", "one", cwd=tmp_path)
    assert done.stdout == f"{[str(tmp_path / 'say.py'), 'one']} True {tmp_path} word é __main__\n"


def test_a_process_with_other_variables_of_python_is_a_new_one(warm_python: WarmPython, tmp_path: Path) -> None:
    done = run(warm_python, "-c", SAY, cwd=tmp_path, PYTHONIOENCODING="latin-1")
    assert (done.stderr, done.returncode) == ("[False, False, False]\n", 3)


def test_an_error_and_a_signal_end_a_process_as_they_end_a_new_one(warm_python: WarmPython, tmp_path: Path) -> None:
    done = run(warm_python, "-c", "raise ValueError('wrong')", cwd=tmp_path)
    assert (done.stderr.splitlines()[-1], done.returncode) == ("ValueError: wrong", 1)
    assert run(warm_python, "-c", "import os; os.kill(os.getpid(), 9)", cwd=tmp_path).returncode == -9


def test_processes_run_at_the_same_time(warm_python: WarmPython, tmp_path: Path) -> None:
    reader = f"{warm_python.python} -c 'print(input()[::-1])'"
    pipe = f"{warm_python.python} -c 'print(\"abc\")' | {reader} | {reader}"
    pipe += f" && {warm_python.folder}/mistral-large --version"
    done = subprocess.run(["bash", "-c", pipe], env=warm_python.environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"abc\nmodeling-mistral-large {__version__}\n")
