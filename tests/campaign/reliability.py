"""What becomes of checkpoints, answers and clients when things go wrong: a campaign through the command line.

Every case runs `mistral-large` in a process of its own, on real files, and is held to the same promises: one clear
error and exit code 2, or the right end; no traceback; the source as it was; nothing half-written under its name. A
broken promise is a loss, and listed.

    python -m tests.campaign --kills 200 --json benchmarks/results/reliability.json

The servers need an environment with the extra `serve` and openai, as .ci/serve makes one: `--sections servers`
there. Sections that did not run stay in the JSON file as they are.
"""

import argparse
import ast
import ctypes
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
import transformers

import mistral_large_conversion.finished
import mistral_large_conversion.inspect
import mistral_large_conversion.verify  # noqa: F401  # so that forked commands need not import it
from mistral_large_cli import main as command_line
from mistral_large_cli.demo import assemble_demo_checkpoint, convert_demo_checkpoint
from mistral_large_conversion.checkpoint.atomic_write import PARTIAL_SUFFIX
from mistral_large_conversion.checkpoint.safetensors_header import FileTensor
from mistral_large_conversion.destination import UNFINISHED_NAME, UNFINISHED_TEXT
from modeling_mistral_large import MistralLargeConfig
from tests.cli.test_json_types import OTHER_KEYS, VALUES
from tests.cli.test_terminal import TEXTS, is_harmless
from tests.conversion.test_foreign_files import KINDS
from tests.support.checkpoints import contents, everything_in, write_consolidated
from tests.support.damage import DAMAGES, LAYOUTS, TOKENIZER, Layout
from tests.support.interruptions import (
    FailingFile,
    can_mount,
    is_whole_or_unnamed,
    kill_at_random_moments,
    open_failing,
    small_disk,
)
from tests.support.loopback_hub import REPOSITORY, LoopbackHub, serve

ROOT = Path(__file__).parent.parent.parent
# 110 MB, so that a conversion takes longer to write the weights than to prepare it.
GEOMETRY = MistralLargeConfig(
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
)
SHARD_SIZE = "20MB"
CLIENTS = 32
ANSWER_SECONDS = 120


@dataclass
class Section:
    """What was tried, how it ended, and what did not end as promised."""

    cases: int = 0
    losses: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def hold(self, is_kept: bool, case: str) -> None:
        if not is_kept:
            self.losses.append(case)
            print(f"    LOSS {case}", flush=True)

    def count(self, figure: str, is_so: bool) -> None:
        self.figures[figure] = self.figures.get(figure, 0) + is_so

    def ended(self, outcome: "Outcome", case: str, code: int) -> None:
        """Hold a command to its exit code, and to one clear line on stderr where that is 2."""
        if "Traceback" in outcome.stderr:
            self.tracebacks.append(case)
        is_clear = code != 2 or (
            outcome.stderr.startswith("mistral-large: ")
            and outcome.stderr.count("mistral-large: ") == 1
            and "\x1b" not in outcome.stderr
        )
        self.hold(outcome.code == code and is_clear, f"{case}: {outcome.code} {outcome.stderr[-300:]}")


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Command:
    """A `mistral-large` of its own, forked off this process so that it need not import everything again."""

    process: int
    folder: Path

    @classmethod
    def start(cls, *arguments: object, prepare: Callable[[], object] = lambda: None) -> "Command":
        folder = Path(mkdtemp(prefix="command"))
        process = os.fork()
        if process == 0:
            code: Any = 1
            try:
                for number, name in ((1, "stdout"), (2, "stderr")):
                    os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
                sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
                sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                sys.argv = ["mistral-large", *map(str, arguments)]
                prepare()
                command_line()
            except SystemExit as exit_:
                code = exit_.code
            except BaseException:
                traceback.print_exc()
            finally:
                with suppress(AttributeError, OSError):
                    sys.stdout.flush()
                os._exit(int(code or 0))
        return cls(process, folder)

    def wait(self) -> Outcome:
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        printed = [(self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        shutil.rmtree(self.folder)
        return Outcome(code, *printed)


def run(*arguments: object, prepare: Callable[[], object] = lambda: None) -> Outcome:
    return Command.start(*arguments, prepare=prepare).wait()


@dataclass(frozen=True)
class Direction:
    """A source, the options of its conversion, and all that an undisturbed one writes, in how many seconds.

    writing_seconds: from the first file in the destination on.
    """

    name: str
    source: Path
    options: tuple[str, ...]
    expected: dict[str, bytes]
    seconds: float
    writing_seconds: float

    @property
    def needed_bytes(self) -> int:
        return sum(map(len, self.expected.values()))

    def command(self, destination: Path) -> tuple[object, ...]:
        return ("convert", self.source, destination, *self.options)


def directions(scratch: Path) -> Iterator[Direction]:
    """Both ways, the second with the result of the first as its source."""
    torch.manual_seed(2407)
    source, to_hf = scratch / "consolidated", scratch / "HF"
    write_consolidated(source, GEOMETRY, torch.bfloat16)
    for layout, origin, destination in (("hf", source, to_hf), ("consolidated", to_hf, scratch / "back")):
        options = ("--to", layout, "--max-shard-size", SHARD_SIZE)
        for _ in range(2):
            # The second time, the source is in memory as in the campaign.
            shutil.rmtree(destination, ignore_errors=True)
            started = time.monotonic()
            command = Command.start("convert", origin, destination, *options)
            wait_for(destination / UNFINISHED_NAME, command)
            prepared = time.monotonic()
            assert command.wait().code == 0
            ended = time.monotonic()
        yield Direction(f"to {layout}", origin, options, contents(destination), ended - started, ended - prepared)


@dataclass
class Campaign:
    """The sections of the campaign, and what they share."""

    scratch: Path
    options: argparse.Namespace

    def __post_init__(self) -> None:
        self.random = random.Random(self.options.seed)
        self.directions = list(directions(self.scratch))
        self.demo = assemble_demo_checkpoint(self.scratch / "demo")
        self.demo_hf = convert_demo_checkpoint(self.scratch / "demo-hf")

    def place(self) -> Path:
        """A new empty folder, removed by its user."""
        return Path(mkdtemp(dir=self.scratch))

    def continued(self, section: Section, direction: Direction, destination: Path, case: str) -> None:
        """Hold the same command, run again, to the same bytes, and forget them."""
        section.ended(run(*direction.command(destination)), f"{case}, continued", 0)
        section.hold(contents(destination) == direction.expected, f"{case}: other bytes")
        shutil.rmtree(destination)

    def kills(self, section: Section) -> None:
        """Conversions killed at random moments: half of them at any, half of them while the weights are written."""
        for direction in self.directions:
            before = everything_in(direction.source)
            for is_writing in (False, True):
                self._kill(section, direction, self.options.kills // 4, is_writing)
            section.hold(everything_in(direction.source) == before, f"{direction.name}: source changed")

    def _kill(self, section: Section, direction: Direction, kills: int, is_writing: bool) -> None:
        destination = self.scratch / "killed"
        commands: list[Command] = []

        def start() -> int:
            commands.append(Command.start(*direction.command(destination)))
            if is_writing:
                wait_for(destination / UNFINISHED_NAME, commands[-1])
            return commands[-1].process

        seconds = direction.writing_seconds if is_writing else direction.seconds
        for was_killed in kill_at_random_moments(start, kills, seconds, self.random):
            shutil.rmtree(commands.pop().folder)
            case = f"{direction.name}, kill {section.cases}"
            section.cases += was_killed
            section.count("left an unfinished folder", was_killed and (destination / UNFINISHED_NAME).exists())
            section.count("left whole files of weights", was_killed and any(destination.glob("*.safetensors")))
            section.hold(is_whole_or_unnamed(destination, direction.expected), f"{case}: half-written")
            # The next one hits what this one has left, or a new folder; a finished one would only be compared.
            if not was_killed or self.random.random() < 0.5:
                self.continued(section, direction, destination, case)
        self.continued(section, direction, destination, f"{direction.name}, last")

    def damage(self, section: Section) -> None:
        """Every kind of damage in every layout, as convert, verify and inspect meet it."""
        for layout in LAYOUTS.values():
            sound = layout.write(self.demo if layout.is_consolidated else self.demo_hf, self.scratch / "sound")
            for name, damage in DAMAGES.items():
                if damage.where(layout):
                    self._damage(section, layout, sound, name)
            shutil.rmtree(sound)
        section.figures |= {"kinds": len(DAMAGES), "layouts": len(LAYOUTS)}

    def _damage(self, section: Section, layout: Layout, sound: Path, name: str) -> None:
        place, case = self.place(), f"{layout.name}: {name}"
        source = Path(shutil.copytree(sound, place / "source"))
        DAMAGES[name].act(source, layout)
        before = everything_in(place)
        to = "hf" if layout.is_consolidated else "consolidated"
        outcome = run("convert", source, place / "out", "--to", to)
        section.cases += 1
        section.ended(outcome, case, 2)
        is_said = DAMAGES[name].problem_in(layout) in outcome.stderr and not outcome.stdout
        section.hold(is_said, f"{case}: not said: {outcome.stderr[:300]}")
        origin = self.demo_hf if layout.is_consolidated else self.demo
        for arguments, codes in ((("verify", source, origin), (1, 2)), (("inspect", source), (0, 2))):
            outcome = run(*arguments)
            section.cases += 1
            section.ended(outcome, f"{arguments[0]}, {case}", outcome.code if outcome.code in codes else codes[0])
        section.hold(everything_in(place) == before, f"{case}: something was written or changed")
        shutil.rmtree(place)

    def full_disks(self, section: Section) -> None:
        """A disk that another program fills meanwhile, one that is too small, and a limit on the size of files."""
        mounts = can_mount()
        for direction in self.directions:
            for number in range(self.options.interruptions):
                case = f"{direction.name}, limit {number}"
                limit = self.random.randrange(1000, 9_000_000)
                destination = self.scratch / "limited"

                def limit_files(limit: int = limit) -> None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

                section.cases += 1
                section.ended(run(*direction.command(destination), prepare=limit_files), case, 2)
                section.hold(is_whole_or_unnamed(destination, direction.expected), f"{case}: half-written")
                self.continued(section, direction, destination, case)
            for number in range(self.options.interruptions if mounts else 0):
                with small_disk(self.scratch / "disk", direction.needed_bytes + 2_000_000) as resize:
                    self._fill(section, direction, f"{direction.name}, disk {number}", resize)
                (self.scratch / "disk").rmdir()
        section.figures["disks of their own"] = mounts

    def _fill(self, section: Section, direction: Direction, case: str, resize: Callable[[int], None]) -> None:
        disk = self.scratch / "disk"
        filler, destination = disk / "filler", disk / "result"
        with filler.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, direction.needed_bytes)
        section.cases += 1
        section.ended(run(*direction.command(destination)), f"{case}, from the start", 2)
        section.hold(not destination.exists(), f"{case}: something was written")
        while True:
            filler.unlink(missing_ok=True)
            command = Command.start(*direction.command(destination))
            has_begun = wait_for(destination / UNFINISHED_NAME, command)
            left = self.random.randrange(direction.needed_bytes)
            free = shutil.disk_usage(disk).free
            if has_begun and free > left:
                # Of what the conversion has taken since, nothing can be had.
                with filler.open("wb") as stream, suppress(OSError):
                    os.posix_fallocate(stream.fileno(), 0, free - left)
            outcome = command.wait()
            if outcome.code:
                break
            # It was ready before the disk was full.
            shutil.rmtree(destination)
        section.cases += 1
        section.ended(outcome, f"{case}, meanwhile", 2)
        section.hold(is_whole_or_unnamed(destination, direction.expected), f"{case}: half-written")
        filler.unlink(missing_ok=True)
        resize(3 * direction.needed_bytes)
        self.continued(section, direction, destination, case)

    def sources(self, section: Section) -> None:
        """Sources that cannot be read to their end: an error of the disk, and files that become shorter meanwhile."""
        for direction in self.directions:
            for number in range(self.options.interruptions):
                reads = self.random.randrange(300)

                def fail(reads: int = reads) -> None:
                    FailingFile.reads_left = reads
                    setattr(FileTensor, "open", open_failing)  # noqa: B010  # in the forked process, and a type checker would object

                case = f"{direction.name}, read error {number}"
                destination = self.scratch / "unread"
                section.cases += 1
                section.ended(run(*direction.command(destination), prepare=fail), case, 2)
                section.hold(is_whole_or_unnamed(destination, direction.expected), f"{case}: half-written")
                self.continued(section, direction, destination, case)
            for number in range(self.options.interruptions):
                self._shrink(section, direction, f"{direction.name}, shrinking {number}")

    def _shrink(self, section: Section, direction: Direction, case: str) -> None:
        place = self.place()
        destination = place / "result"
        while True:
            source = Path(shutil.copytree(direction.source, place / "source"))
            command = Command.start("convert", source, destination, *direction.options)
            wait_for(destination / UNFINISHED_NAME, command)
            for path in source.glob("*.safetensors"):
                os.truncate(path, self.random.randrange(path.stat().st_size))
            outcome = command.wait()
            if outcome.code:
                break
            # It was ready before.
            shutil.rmtree(source)
            shutil.rmtree(destination)
        section.cases += 1
        section.ended(outcome, case, 2)
        section.hold(is_whole_or_unnamed(destination, direction.expected), f"{case}: half-written")
        self.continued(section, direction, destination, case)
        shutil.rmtree(place)

    def bit_flips(self, section: Section) -> None:
        """One bit of the weights, each time another: the manifest alone must show it."""
        in_headers = 0
        for direction in self.directions:
            folder = Path(
                shutil.copytree(
                    self.scratch / ("HF" if direction.name == "to hf" else "back"), self.place(), dirs_exist_ok=True
                )
            )
            files = sorted(folder.glob("*.safetensors"))
            for number in range(self.options.flips // 2):
                path = self.random.choice(files)
                # Every tenth in the header, which has but a thousandth of the bytes.
                header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
                is_in_header = number % 10 == 0
                end = header_bytes if is_in_header else path.stat().st_size
                place, mask = (
                    self.random.randrange(0 if is_in_header else header_bytes, end),
                    1 << self.random.randrange(8),
                )
                case = f"{direction.name}, bit {mask} of byte {place} of {path.name}"
                flip(path, place, mask)
                outcome = run("verify", folder)
                flip(path, place, mask)
                section.cases += 1
                in_headers += is_in_header
                section.ended(outcome, case, 2 if outcome.code == 2 else 1)
            section.ended(run("verify", folder), f"{direction.name}, sound", 0)
            shutil.rmtree(folder)
        section.figures["in headers"] = in_headers

    def foreign(self, section: Section) -> None:
        """Names in an unfinished destination that are a link to someone else's file, or a pipe."""
        for source, to in ((self.demo, "hf"), (self.demo_hf, "consolidated")):
            destination, precious = self.scratch / "foreign", self.scratch / "precious"
            assert run("convert", source, destination, "--to", to).code == 0
            expected, before = contents(destination), contents(source)
            shutil.rmtree(destination)
            precious.write_bytes(b"precious")
            targets = (precious, sorted(source.glob("*.safetensors"))[0])
            for name, make in product(sorted(expected), KINDS):
                suffix, target = self.random.choice(("", PARTIAL_SUFFIX)), self.random.choice(targets)
                destination.mkdir()
                (destination / UNFINISHED_NAME).write_bytes(UNFINISHED_TEXT)
                make(destination / f"{name}{suffix}", target)
                case = f"to {to}, {name}{suffix} a {make.__name__} to {target.name}"
                section.cases += 1
                section.ended(run("convert", source, destination, "--to", to), case, 0)
                section.hold(contents(destination) == expected, f"{case}: other bytes")
                is_kept = precious.read_bytes() == b"precious" and contents(source) == before
                section.hold(is_kept, f"{case}: written through")
                shutil.rmtree(destination)

    def json_values(self, section: Section) -> None:
        """Values of every JSON type and size in the place of each value of params.json and config.json."""
        for sound, name in ((self.demo, "params.json"), (self.demo_hf, "config.json")):
            folder = Path(shutil.copytree(sound, self.place() / "folder"))
            content = json.loads((folder / name).read_text())
            pairs = [(key, value) for key in sorted({*content, *OTHER_KEYS}) for value in VALUES]
            for key, value in self.random.sample(pairs, min(len(pairs), self.options.values)):
                others = [f"{json.dumps(other)}: {json.dumps(content[other])}" for other in content if other != key]
                (folder / name).write_text("{" + ", ".join([f"{json.dumps(key)}: {value}", *others]) + "}")
                to = "hf" if name == "params.json" else "consolidated"
                convert = ("convert", folder, folder.parent / "out", "--to", to, "--dry-run")
                for arguments in (convert, ("inspect", folder), ("verify", folder), ("plan", folder, "--gpus", "80GB")):
                    outcome, case = run(*arguments), f"{name}, {key!r} {value[:40]}: {arguments[0]}"
                    section.cases += 1
                    section.ended(outcome, case, outcome.code if outcome.code in (0, 1, 2) else 2)
                    section.hold(is_harmless(outcome.stdout + outcome.stderr), f"{case}: commands the terminal")
            shutil.rmtree(folder.parent)

    def texts(self, section: Section) -> None:
        """Escape sequences, line ends and letters turned around in every text of a checkpoint that is printed."""
        for text, act in TEXTS.items():
            folder = Path(shutil.copytree(self.demo_hf, self.place() / "folder"))
            act(folder)
            convert = ("convert", folder, folder.parent / "out", "--to", "consolidated", "--dry-run")
            others = [("inspect", folder), ("inspect", folder, "--json"), ("verify", folder), ("plan", folder)]
            for arguments in (convert, *others, ("retag", folder, "--as", "mistral")):
                outcome, case = run(*arguments), f"{text}: {arguments[0]}"
                section.cases += 1
                section.ended(outcome, case, outcome.code if outcome.code in (0, 1, 2) else 2)
                section.hold(is_harmless(outcome.stdout + outcome.stderr), f"{case}: commands the terminal")
            shutil.rmtree(folder.parent)

    def streams(self, section: Section) -> None:
        """A standard output that is full, closed, without a reader or ASCII only, and one that is a text of bytes."""
        folder, out = self.demo_hf, self.scratch / "streams"
        commands = (
            ("inspect", folder),
            ("inspect", folder, "--json"),
            ("verify", folder),
            ("plan", "--gpus", "8x80GB"),
            ("convert", folder, out, "--to", "consolidated", "--dry-run"),
            ("convert", folder, out, "--to", "consolidated"),
            ("retag", folder, "--as", "mistral_large"),
        )
        for name, (prepare, code) in STREAMS.items():
            for arguments in commands:
                section.cases += 1
                section.ended(run(*arguments, prepare=prepare), f"{name}: {' '.join(map(str, arguments))}", code)
                shutil.rmtree(out, ignore_errors=True)

    def together(self, section: Section) -> None:
        """Two and six conversions into one folder at once: one writes, the others refuse or find it finished."""
        for direction in self.directions:
            for count in (2, 6):
                for number in range(self.options.interruptions):
                    case = f"{direction.name}, {count} at once, {number}"
                    destination = self.scratch / "shared"
                    commands = [Command.start(*direction.command(destination)) for _ in range(count)]
                    outcomes = [command.wait() for command in commands]
                    section.cases += 1
                    for outcome in outcomes:
                        section.ended(outcome, case, 2 if outcome.code == 2 else 0)
                    section.hold(any(outcome.code == 0 for outcome in outcomes), f"{case}: none has written")
                    section.hold(contents(destination) == direction.expected, f"{case}: other bytes")
                    shutil.rmtree(destination)

    def unreadable(self, section: Section) -> None:
        """Folders and files that the user may not read or write."""
        for direction in self.directions:
            for name in ("", "a file of weights", "the settings", TOKENIZER, "LICENSE", "destination", "its parent"):
                place = self.place()
                source = Path(shutil.copytree(direction.source, place / "source"))
                (place / "out" / "result").mkdir(parents=True)
                (source / "LICENSE").write_text("a licence")
                chosen = {
                    "": source,
                    "a file of weights": sorted(source.glob("*.safetensors"))[-1],
                    "the settings": next(source.glob("[cp][oa][nr][fa]*[gs].json")),
                    "destination": place / "out" / "result",
                    "its parent": place / "out",
                }.get(name, source / name)
                if name == "its parent":
                    (place / "out" / "result").rmdir()
                chosen.chmod(0o555 if name in ("destination", "its parent") else 0)
                before = everything_in(place)
                command = ("convert", source, place / "out" / "result", *direction.options)
                section.cases += 1
                case = f"{direction.name}, unreadable: {name or 'source'}"
                section.ended(run(*command, prepare=give_up_privileges), case, 2)
                section.hold(everything_in(place) == before, f"{case}: something was written or changed")
                shutil.rmtree(place)

    def hub(self, section: Section) -> None:
        """A repository whose connection is cut, or one of whose files cannot be had; a command killed meanwhile."""
        expected = contents(self.demo_hf)
        files = sorted(path.name for path in self.demo.glob("*.safetensors"))
        for number in range(self.options.interruptions):
            place = self.place()
            command = ("convert", REPOSITORY, str(place / "result"))
            with serve(LoopbackHub(self.demo)) as hub:
                cut = {name: self.random.randrange(1, (self.demo / name).stat().st_size) for name in files}
                hub.cut_after |= cut
                section.cases += 1
                case = f"cut after {cut}"
                section.ended(run_on_hub(hub, place, *command).wait_for_end(), case, 0)
                section.hold(not hub.cut_after, f"{case}: not cut")
                section.hold(contents(place / "result") == expected, f"{case}: other bytes")
            shutil.rmtree(place)
            place = self.place()
            command = ("convert", REPOSITORY, str(place / "result"))
            with serve(LoopbackHub(self.demo)) as hub:
                if number % 2:
                    hub.broken.add(files[number % len(files)])
                    section.ended(run_on_hub(hub, place, *command).wait_for_end(), f"cannot be had {number}", 2)
                    hub.broken.clear()
                else:
                    child = run_on_hub(hub, place, *command)
                    while not hub.downloads and child.process.poll() is None:
                        time.sleep(0.002)
                    time.sleep(self.random.uniform(0, 0.1))
                    child.process.kill()
                    child.wait_for_end()
                section.cases += 1
                section.hold(not (place / "result").exists(), f"interrupted {number}: something was written")
                section.ended(run_on_hub(hub, place, *command).wait_for_end(), f"interrupted {number}, continued", 0)
                section.hold(contents(place / "result") == expected, f"interrupted {number}: other bytes")
            shutil.rmtree(place)
        refusals = {"gated": HTTPStatus.FORBIDDEN, "refuse": HTTPStatus.INTERNAL_SERVER_ERROR}
        for attribute, status in [
            *refusals.items(),
            ("gated", HTTPStatus.UNAUTHORIZED),
            ("refuse", HTTPStatus.FORBIDDEN),
        ]:
            place = self.place()
            with serve(LoopbackHub(self.demo)) as hub:
                setattr(hub, attribute, status)
                outcome = run_on_hub(hub, place, "convert", REPOSITORY, str(place / "result")).wait_for_end()
            section.cases += 1
            section.ended(outcome, f"{attribute} {status}", 2)
            section.hold(not (place / "result").exists(), f"{attribute} {status}: something was written")
            shutil.rmtree(place)

    def answers(self, section: Section) -> None:
        """Answers with ids removed, added, repeated and shuffled: parsed without an exception, no character lost."""
        count = self.options.mutations
        self._tests(
            section, count, "tests/modeling/instruct/test_tool_calls.py", "mutated_answers", "MISTRAL_LARGE_MUTATIONS"
        )

    def conversations(self, section: Section) -> None:
        """Random conversations, among them those with control strings in every place: the reference's ids."""
        count = self.options.conversations
        self._tests(
            section,
            count,
            "tests/modeling/instruct/test_chat_prompts.py",
            "ids_are_the_references",
            "MISTRAL_LARGE_CONVERSATIONS",
        )

    def _tests(self, section: Section, count: int, file: str, name: str, variable: str) -> None:
        arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", name]
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, variable: str(count)},
            capture_output=True,
            text=True,
        )
        section.cases += count
        section.hold(done.returncode == 0, done.stdout[-2000:])

    def servers(self, section: Section) -> None:
        """Clients of our server, of which every second one hangs up in the middle of its answer."""
        from tests.engines.clients import GOLDEN, ask, client_of, expected_answer, hang_up, request_of, stream
        from tests.engines.servers import free_port, running

        port, folder = free_port(), str(self.demo_hf)
        options = ("--engine", "transformers", "--port", str(port), "--device-map", "cpu", "--dtype", "float32")
        command = [sys.executable, "-m", "mistral_large_cli", "serve", folder, *options]
        chosen = list(GOLDEN.values())
        with running("our server", command, port=port, log_file=self.scratch / "log") as server:

            def one(number: int) -> str | None:
                golden = chosen[number % len(chosen)]
                request = request_of(golden, folder)
                if number % 2:
                    hang_up(client_of(server), request, pieces=number // 2 % 4)
                    return None
                answer = (ask if number % 4 else stream)(client_of(server), request)
                is_golden = (answer.content, answer.calls) == expected_answer(golden)
                return None if is_golden else f"{golden.name}: {answer}"

            for turn in range(self.options.turns):
                with ThreadPoolExecutor(CLIENTS) as threads:
                    for number, problem in enumerate(threads.map(one, range(turn, turn + CLIENTS))):
                        section.cases += 1
                        section.hold(problem is None, f"turn {turn}, client {number}: {problem}")
            started = time.monotonic()
            section.hold(one(0) is None, "no answer after all of them")
            section.figures["seconds of an answer after all"] = round(time.monotonic() - started, 2)
            log = (self.scratch / "log").read_text(errors="replace")
            section.figures["tracebacks in the log of the server"] = log.count("Traceback")
        section.figures["clients at once"] = CLIENTS


def full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def closed() -> None:
    os.close(0)
    os.close(1)
    sys.stdin = sys.stdout = None  # as an interpreter has them then


def without_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    # A pipe cannot be moved in, and a stream on a file would try.
    sys.stdout = os.fdopen(1, "w", closefd=False)


def ascii_only() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii")  # type: ignore[union-attr]  # made by Command.start


# What becomes of the standard output, and the exit code of every command then.
STREAMS: dict[str, tuple[Callable[[], None], int]] = {
    "full": (full, 2),
    "closed": (closed, 0),
    "without a reader": (without_reader, 1),
    "ASCII only": (ascii_only, 0),
}
# What a row of the table says, with figures of the section.
SECTIONS = {
    "kills": "conversions killed by SIGKILL at random moments and run again, both ways; {left an unfinished folder} "
    "left an unfinished folder, {left whole files of weights} of them with whole files of weights",
    "damage": "{kinds} kinds of damage in {layouts} layouts (consolidated and HF; one file, shards with and without an "
    "index), as `convert`, `verify` and `inspect` meet it",
    "full_disks": "a limit on the size of files; a disk that is too small; one that another program fills meanwhile",
    "sources": "read errors of the disk, and files that become shorter while they are read",
    "bit_flips": "one bit of the files of weights, {in headers} of them in a header; `verify` has the manifest only",
    "foreign": "hard links, links and pipes under every name of an unfinished destination",
    "json_values": "values of every JSON type and of up to 400 digits in `params.json` and `config.json`, as "
    "`convert`, `inspect`, `verify` and `plan` meet them",
    "texts": "escape sequences and line ends in every text of a checkpoint that is printed",
    "streams": "a standard output that is full, closed, without a reader or ASCII only",
    "together": "two and six conversions into one folder at once",
    "unreadable": "folders and files that may not be read or written",
    "hub": "connections to the hub that are cut, files that cannot be had, commands killed in a download, refusals",
    "answers": "responses with ids removed, added, repeated and shuffled, whole and streamed",
    "conversations": "random conversations, a third of them with control strings in every place, against the reference",
    "servers": "requests to our server, {clients at once} at once, of which every second one hangs up",
}


def table(results: dict[str, Any]) -> str:
    """The table of docs/reliability.md."""
    lines = ["| what | cases | losses | tracebacks |", "| --- | --- | --- | --- |"]
    for name, what in SECTIONS.items():
        if name in results:
            section = results[name]
            counts = (section["cases"], len(section["losses"]), len(section["tracebacks"]))
            lines.append(f"| {what.format_map(section['figures'])} | {' | '.join(f'{count:,}' for count in counts)} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class HubCommand:
    """A command of an interpreter of its own, as the client of the hub reads its settings when it is imported."""

    process: subprocess.Popen[str]

    def wait_for_end(self) -> Outcome:
        stdout, stderr = self.process.communicate(timeout=ANSWER_SECONDS)
        return Outcome(self.process.returncode, stdout, stderr)


def run_on_hub(hub: LoopbackHub, place: Path, *arguments: str) -> HubCommand:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return HubCommand(
        subprocess.Popen(
            [sys.executable, "-m", "mistral_large_cli", *arguments],
            env={**environment, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )


def wait_for(path: Path, command: Command) -> bool:
    """Wait for a file that a command makes; whether it came before the command ended."""
    while not path.exists():
        if os.waitid(os.P_PID, command.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.0005)
    return True


def flip(path: Path, place: int, mask: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ mask]))


def give_up_privileges() -> None:
    """Let the permissions of files count for the superuser, too, in this process."""
    # The version of the two structures, and of the process itself all capabilities off.
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=ast.get_docstring(ast.parse(Path(__file__).read_text())))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS][:-1])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--interruptions", type=int, default=10, help="of each other kind and direction")
    parser.add_argument("--values", type=int, default=100, help="of params.json, and as many of config.json")
    parser.add_argument("--mutations", type=int, default=20_000, help="answers")
    parser.add_argument("--conversations", type=int, default=6_000)
    parser.add_argument("--turns", type=int, default=4, help=f"of {CLIENTS} clients")
    parser.add_argument("--seed", type=int, default=2407)
    parser.add_argument("--json", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    if "servers" in options.sections and find_spec("openai") is None:
        parser.error("the section servers needs the extra `serve` and openai; see .ci/serve")
    # A name without a folder could be a repository's id; only the section on the hub may ask one, and it is here.
    os.environ["HF_HUB_OFFLINE"] = "1"
    results: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        campaign = Campaign(Path(scratch), options)
        for name in options.sections:
            section, started = Section(), time.monotonic()
            print(name, flush=True)
            getattr(campaign, name)(section)
            seconds = round(time.monotonic() - started)
            results[name] = {**asdict(section), "seconds": seconds, "transformers": transformers.__version__}
            print(
                f"    {section.cases} cases, {len(section.losses)} losses, {len(section.tracebacks)} tracebacks, "
                f"{section.figures}, {seconds} s",
                flush=True,
            )
            if options.json:
                # Others may have run since.
                before = json.loads(options.json.read_text()) if options.json.exists() else {}
                options.json.parent.mkdir(parents=True, exist_ok=True)
                merged = {**before, **results}
                ordered = {name: merged[name] for name in SECTIONS if name in merged}
                options.json.write_text(json.dumps(ordered, indent=2) + "\n")
    print(f"\n{table(results)}")
    sys.exit(any(section["losses"] or section["tracebacks"] for section in results.values()))


if __name__ == "__main__":
    main()
