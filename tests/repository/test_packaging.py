"""What is installed: the wheel's names and files, and what an import or a `--help` costs."""

import os
import runpy
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from transformers.models.auto import modeling_auto

from modeling_mistral_large.supported import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS
from modeling_mistral_large.transformers_api.registration import warn_outside_range
from tests.support import clean_forks
from tests.support.clean_forks import CleanForks

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
PACKAGES = ("modeling_mistral_large", "mistral_large_conversion", "mistral_large_cli")


def python(code: str, *arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Run `code` in a fresh interpreter in `cwd`, `path` first among its import paths; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    (folder / "dist").mkdir()
    python(BUILD, str(folder / "dist"), cwd=folder / "source")
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


STOCK = "from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, TokenizersBackend"


@pytest.fixture(scope="module")
def stock_modules(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What stock Mistral imports in a fresh interpreter."""
    return set(python(f"import sys; {STOCK}; print(*sys.modules)", cwd=tmp_path_factory.mktemp("stock")).split())


@pytest.fixture(scope="module")
def forks(stock_modules: set[str]) -> Iterator[CleanForks]:
    """Interpreters that have imported what stock Mistral does, but for transformers."""
    with clean_forks.start(stock_modules) as started:
        yield started


@pytest.mark.slow
def test_the_wheel_installs_three_names_of_our_own_and_nothing_generic(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_every_data_file_once(wheel: Path) -> None:
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert "mistral_large_conversion/chat_templates/mistral_large_2407.jinja" in expected
    assert "mistral_large_conversion/licence/Notice" in expected
    assert any(name.startswith("mistral_large_cli/demo_checkpoint/consolidated-00001-of-") for name in expected)
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected


def test_a_checkout_has_no_links() -> None:
    # git makes text files of them on Windows.
    assert not [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_symlink()]


@pytest.mark.slow
def test_the_wheel_imports_from_where_it_lies(wheel: Path, tmp_path: Path, forks: CleanForks) -> None:
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    found = forks.run(
        """
import importlib.resources, importlib.util
import mistral_large_cli, mistral_large_conversion, modeling_mistral_large
for module in (mistral_large_cli, mistral_large_conversion, modeling_mistral_large):
    print(module.__file__)
templates = importlib.resources.files("mistral_large_conversion") / "chat_templates"
assert "[INST]" in (templates / "mistral_large_2407.jinja").read_text()
for name in ("conversion", "chat_templates"):
    assert importlib.util.find_spec(name) is None, name
""",
        cwd=tmp_path,
        path=installed,
    )
    assert all(Path(line).is_relative_to(installed) for line in found.split())


@pytest.mark.slow
def test_the_wheel_asks_for_the_whole_supported_range_of_transformers(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    assert "Name: modeling-mistral-large" in lines
    assert "Requires-Python: >=3.10" in lines
    commands = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert "[console_scripts]\nmistral-large = mistral_large_cli:main\n" in commands
    assert "Requires-Dist: transformers<5.25,>=5.17" in lines
    assert not any(line.startswith("Requires-Dist: mistral-common") and "extra" not in line for line in lines)


@pytest.mark.slow
def test_importing_the_package_loads_nothing_else_than_stock_mistral_does(
    tmp_path: Path, stock_modules: set[str]
) -> None:
    code = "import sys; import modeling_mistral_large; print(*sys.modules)"
    ours = set(python(code, cwd=tmp_path, path=ROOT).split())
    more = {name for name in ours - stock_modules if not name.startswith((*PACKAGES, "transformers"))}
    assert more == set()
    assert "mistral_large_conversion.convert" not in ours


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import modeling_mistral_large, transformers",
        "import transformers, modeling_mistral_large",
        "import transformers.models.auto.modeling_auto, modeling_mistral_large",
        "import modeling_mistral_large, importlib; importlib.reload(modeling_mistral_large)",
        "import modeling_mistral_large, transformers.processing_utils",
    ],
)
def test_registration_works_before_and_after_transformers(imports: str, tmp_path: Path, forks: CleanForks) -> None:
    forks.run(
        imports
        + """
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
config = AutoConfig.for_model("mistral_large", vocab_size=800, head_dim=4, **sizes)
assert type(AutoModelForCausalLM.from_config(config)) is modeling_mistral_large.MistralLargeForCausalLM
assert type(AutoConfig.for_model("mistral")) is MistralConfig
""",
        cwd=tmp_path,
        path=ROOT,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, modeling_mistral_large, importlib; importlib.reload(modeling_mistral_large)",
        # It puts a new module in the place of `transformers`.
        "import modeling_mistral_large, transformers, transformers.processing_utils",
    ],
)
def test_every_public_class_is_found_in_transformers(imports: str, tmp_path: Path, forks: CleanForks) -> None:
    forks.run(
        "import transformers; first = transformers\n"
        + imports
        + """
import sys
classes = [name for name in modeling_mistral_large.__all__ if isinstance(getattr(modeling_mistral_large, name), type)]
assert len(classes) >= 8
for name in classes:
    for module in (first, sys.modules["transformers"]):
        assert getattr(module, name) is getattr(modeling_mistral_large, name), name
    assert not hasattr(transformers.models, name)
    assert not hasattr(transformers.models.mistral, name)
from transformers import MistralForCausalLM, MistralLargeForCausalLM
assert MistralLargeForCausalLM is modeling_mistral_large.MistralLargeForCausalLM
assert not hasattr(transformers, "MistralLargeForNothing")
""",
        cwd=tmp_path,
        path=ROOT,
    )


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("MODEL_MAPPING_NAMES", "MistralLargeModel"),
        ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MistralLargeForCausalLM"),
        ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "MistralLargeForQuestionAnswering"),
        ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "MistralLargeForSequenceClassification"),
        ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "MistralLargeForTokenClassification"),
    ],
)
def test_every_head_is_among_the_names_that_pipelines_read(table: str, name: str) -> None:
    assert getattr(modeling_auto, table)["mistral_large"] == name


OUTSIDE = (
    "transformers {installed} is installed; modeling-mistral-large is tested with 5.17 to 5.24, and another version "
    "may give wrong results without an error: run `mistral-large doctor`, or install one of the range"
)


@pytest.mark.parametrize("installed", ["5.16.9", "5.25.0", "5.25.0.dev0", "6.0.1", "4.57.0"])
def test_a_transformers_outside_the_range_is_said(installed: str) -> None:
    with pytest.warns(UserWarning, match="modeling-mistral-large") as caught:
        warn_outside_range(installed)
    assert [str(warning.message) for warning in caught] == [OUTSIDE.format(installed=installed)]


@pytest.mark.slow
def test_importing_the_package_says_once_that_transformers_is_outside_the_range(
    tmp_path: Path, forks: CleanForks
) -> None:
    said = forks.run(
        """
import importlib, sys, warnings
import transformers.processing_utils
sys.modules["transformers"].__version__ = "5.99.0"
with warnings.catch_warnings(record=True) as caught:
    import modeling_mistral_large
    importlib.reload(modeling_mistral_large)
print(*(warning.message for warning in caught if "modeling-mistral-large" in str(warning.message)), sep="\\n")
""",
        cwd=tmp_path,
        path=ROOT,
    )
    assert said.splitlines() == [OUTSIDE.format(installed="5.99.0")]


@pytest.mark.parametrize("installed", ["5.17.0", "5.17.0.dev0", "5.23.0", "5.24.7", transformers.__version__])
def test_a_transformers_inside_the_range_is_not_spoken_of(installed: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_outside_range(installed)


def test_the_range_is_literals_that_can_be_read_without_an_import() -> None:
    found = runpy.run_path(str(ROOT / "modeling_mistral_large" / "supported.py"))
    assert (found["OLDEST_TRANSFORMERS"], found["NEWEST_TRANSFORMERS"]) == (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "Usage"),
        (["convert", "--help"], 0, "Usage"),
        (["demo", "--help"], 0, "Usage"),
        (["--version"], 0, "modeling-mistral-large"),
        (["no-such-command"], 2, "No such command"),
        (["convert", "--no-such-option"], 2, "No such option"),
        (["chat", "--help"], 0, "Usage"),
        (["plan", "--help"], 0, "Usage"),
        (["serve", "--port", "0", "folder"], 2, "Invalid value"),
        (["convert"], 2, "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_usage_errors_never_import_torch(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    # With None in sys.modules any import of these raises.
    command = """
import sys
for heavy in ("torch", "transformers", "tokenizers", "sentencepiece", "modeling_mistral_large"):
    sys.modules[heavy] = None
from mistral_large_cli import main
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code, result.stderr
    assert said in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
