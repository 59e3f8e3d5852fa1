"""Drive exllamav2's or exllamav3's own converter where CUDA and the library are there.

Only plans and runs their command lines; everything about the formats stays with them. exllamav2 measures a model once
and reuses the measurement for every bitrate; exllamav3 has no such pass.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recompile.errors import OutputError, RecompileError, UnsupportedError
from recompile.io.files import partial_path

ENGINES = ("exllamav2", "exllamav3")
# exllamav3 keeps its converter in a module without a command line of its own.
_EXL3_MAIN = (
    "import sys; from exllamav3.conversion.convert_model import main, parser, prepare; "
    "found = prepare(parser.parse_args()); "
    "sys.exit(str(found[3])) if not found[2] else main(found[0], found[1])"
)
_KEPT_LINES = 30


@dataclass(frozen=True)
class EngineStep:
    """One run of a converter. `made`: the file or directory that it leaves when it succeeds."""

    title: str
    command: tuple[str, ...]
    made: Path


@dataclass(frozen=True)
class EngineOutput:
    """A line that a converter printed."""

    step: EngineStep
    number: int
    total: int
    line: str


def check_engine(engine: str) -> None:
    """Raise UnsupportedError unless the engine is installed and CUDA is there."""
    import torch

    if importlib.util.find_spec(engine) is None:
        raise UnsupportedError(
            f"{{engine}} {engine}: {engine} is not installed; pip install {engine}, or leave {{engine}} out: this "
            f"program's own encoder runs on any device"
        )
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"{{engine}} {engine}: its converter needs a CUDA device and this machine offers none; leave {{engine}} "
            f"out: "
            f"this program's own encoder runs on any device"
        )


def plan_engine(
    engine: str,
    base: Path,
    out_dir: Path,
    bits: Sequence[float],
    head_bits: int,
    rows: int,
    length: int,
    device: str = "0",
    codebook: str = "mul1",
) -> list[EngineStep]:
    """The converter runs that make OUT_DIR/<b>bpw for every bitrate. Pure."""
    work = out_dir / f".{engine}-work"
    steps = []
    command: tuple[str, ...]
    if engine == "exllamav2":
        converter = (sys.executable, "-m", "exllamav2.conversion.convert_exl2", "-i", str(base))
        size = ("-r", str(rows), "-l", str(length))
        measurement = work / "measurement.json"
        steps.append(
            EngineStep(
                "measuring",
                (*converter, "-o", str(work / "measure"), "-om", str(measurement), *size, "-nr"),
                measurement,
            )
        )
        for rate in bits:
            target = out_dir / f"{rate:g}bpw"
            building = partial_path(target)
            command = (*converter, "-o", str(work / f"{rate:g}"), "-m", str(measurement), "-b", f"{rate:g}")
            command += ("-hb", str(head_bits), *size, "-cf", str(building), "-nr")
            steps.append(EngineStep(f"{rate:g} bpw", command, target))
        return steps
    for rate in bits:
        target = out_dir / f"{rate:g}bpw"
        building = partial_path(target)
        command = (sys.executable, "-c", _EXL3_MAIN, "-i", str(base), "-w", str(work / f"{rate:g}"))
        command += ("-o", str(building), "-b", f"{rate:g}", "-hb", str(head_bits), "-cr", str(rows))
        command += ("-cc", str(length), "-d", device, "-cb", codebook)
        steps.append(EngineStep(f"{rate:g} bpw", command, target))
    return steps


def run_engine(steps: Sequence[EngineStep]) -> Iterator[EngineOutput]:
    """Run the steps whose result is not there yet, yielding what they print.

    A variant gets its name when its converter has ended well. Raises RecompileError with the converter's last lines
    where one fails, OutputError where a directory cannot be made.
    """
    for number, step in enumerate(steps):
        if step.made.exists():
            continue
        building = partial_path(step.made)
        try:
            step.made.parent.mkdir(parents=True, exist_ok=True)
            for flag in ("-o", "-w"):
                if flag in step.command:
                    Path(step.command[step.command.index(flag) + 1]).mkdir(parents=True, exist_ok=True)
            if building.exists():
                shutil.rmtree(building)
        except OSError as error:
            raise OutputError(f"{error.filename}: cannot be written: {error.strerror or error}") from error
        last: list[str] = []
        with subprocess.Popen(step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None, "asked for a pipe"
            for line in process.stdout:
                last = [*last, line.rstrip()][-_KEPT_LINES:]
                yield EngineOutput(step, number, len(steps), line.rstrip())
        if process.returncode:
            printed = "\n  ".join(last)
            raise RecompileError(f"{step.title}: the converter ended with status {process.returncode}:\n  {printed}")
        if building.exists():
            os.replace(building, step.made)
        if not step.made.exists():
            raise RecompileError(f"{step.title}: the converter ended well and left no {step.made}")
