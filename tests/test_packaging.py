"""The wheel and the source archive that this tree builds, and the commands of an installed wheel."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import recompile

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("recompile", "eval", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the packages, is not installed")
    folder = tmp_path_factory.mktemp("package")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "dist"


def test_one_version_everywhere() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf'^version = "{re.escape(recompile.__version__)}"$', text, re.MULTILINE)
    assert f"## {recompile.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_holds_every_module_and_template(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        path.relative_to(ROOT).as_posix() for room in ("recompile", "eval") for path in (ROOT / room).rglob("*.py")
    }
    assert modules <= names
    assert not {name for name in names if name.startswith(("tests/", "scripts/"))}
    data = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "eval/report").iterdir()
        if path.suffix in (".html", ".js", ".css")
    }
    assert len(data) >= 4
    assert data | {"recompile/py.typed", "eval/py.typed"} <= names
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    assert modules | data | {"pyproject.toml", "README.md", "LICENSE"} <= inside


def test_an_installed_wheel_has_working_commands(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    done = subprocess.run([str(word) for word in install], capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("pip is not installed")
    assert done.returncode == 0, done.stderr
    settings = {**os.environ, "PYTHONPATH": str(site)}
    for command in ("recompile", "model_diff", "model_auto"):
        told = subprocess.run(
            [sys.executable, str(site / "bin" / command), "--help"],
            cwd=tmp_path,
            env=settings,
            capture_output=True,
            text=True,
        )
        assert told.returncode == 0, told.stderr
        assert told.stdout.startswith(f"Usage: {command}")
    code = "import recompile, eval.report.page as p; print(recompile.__file__, len(p._file('page.html')))"
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert told.stdout.startswith(str(site)), told.stdout + told.stderr
