"""Driving other converters: the plans as values, and the running with stand-ins for the converters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from recompile.errors import RecompileError, UnsupportedError
from recompile.quantize.external_converters import EngineStep, check_engine, plan_engine, run_engine


def test_exllamav2_measures_once_and_reuses_it(tmp_path: Path) -> None:
    steps = plan_engine("exllamav2", Path("base"), tmp_path, [2.5, 4.0], 6, 100, 2048)
    measure, *builds = (step.command for step in steps)
    measurement = measure[measure.index("-om") + 1]
    assert [step.made.name for step in steps] == ["measurement.json", "2.5bpw", "4bpw"]
    assert "-m" in builds[0]
    for command, bits in zip(builds, ("2.5", "4"), strict=True):
        assert command[command.index("-m", 4) + 1] == measurement
        assert command[command.index("-b") + 1] == bits
        assert command[command.index("-hb") + 1] == "6"
        assert command[command.index("-cf") + 1].endswith(f"{bits}bpw.recompile-partial")


def test_exllamav3_gets_its_own_flags(tmp_path: Path) -> None:
    (step,) = plan_engine("exllamav3", Path("base"), tmp_path, [3.0], 6, 100, 2048, "1", "mcg")
    words = step.command[3:]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert flags["-b"] == "3"
    assert flags["-d"] == "1"
    assert flags["-cb"] == "mcg"
    assert flags["-o"].endswith("3bpw.recompile-partial")


def test_without_cuda_the_flag_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match=r"is not installed|needs a CUDA device"):
        check_engine("exllamav3")


def _step(made: Path, code: str) -> EngineStep:
    return EngineStep("4 bpw", (sys.executable, "-c", code), made)


def test_a_variant_gets_its_name_when_the_converter_ended_well(tmp_path: Path) -> None:
    made = tmp_path / "4bpw"
    code = f"import os; os.makedirs({str(made) + '.recompile-partial'!r}); print('half way')"
    lines = [output.line for output in run_engine([_step(made, code)])]
    assert lines == ["half way"]
    assert made.is_dir()
    assert list(run_engine([_step(made, "raise SystemExit(1)")])) == []  # whole already: not run again


def test_a_converter_that_fails_leaves_no_variant(tmp_path: Path) -> None:
    made = tmp_path / "4bpw"
    code = f"import os; os.makedirs({str(made) + '.recompile-partial'!r}); print('out of memory'); raise SystemExit(3)"
    with pytest.raises(RecompileError, match="status 3") as caught:
        list(run_engine([_step(made, code)]))
    assert "out of memory" in str(caught.value)
    assert not made.exists()
