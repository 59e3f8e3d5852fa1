"""What tests of every room share. No test needs a network."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
gc.set_threshold(20_000, 20, 100)  # all of transformers is walked each time, a twentieth of what the tests take

ROOT = Path(__file__).resolve().parent.parent
# The files that take longest, longest first: one that came last would leave the other workers idle.
LONGEST = (
    "cli/test_model_auto.py", "eval/test_memory.py", "report/test_browser.py", "eval/test_engine_models.py",
    "eval/test_heal.py", "eval/test_judges.py", "cli/test_end_to_end.py", "hostile/test_state_files.py",
    "eval/test_cluster.py", "quantize/test_made_exl.py", "quantize/test_mlx_encode.py", "cli/test_optimize_search.py",
    "quantize/test_exl3_encode.py", "cli/test_trace_in_commands.py", "test_api.py", "hostile/test_kills.py",
    "quantize/test_pipeline.py", "cli/test_model_optimize.py", "cli/test_auto_refusals.py", "formats/test_ik.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def load_script(name: str) -> ModuleType:
    """scripts/NAME.py as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> Iterator[None]:
    """Tiny models run slower on many threads, and a machine with many cores would sum in another order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and what a killed process wrote is there without: fsync takes milliseconds a file."""
    before = os.fsync, os.fdatasync
    os.fsync = os.fdatasync = lambda descriptor: None
    yield
    os.fsync, os.fdatasync = before


def _tokenizer_files(model: Path) -> str:
    """A hash of all small files that lie beside a tokenizer, its own among them."""
    folder, known = (model, "") if model.is_dir() else (model.parent, f"{model} {model.stat()}")
    files = [
        file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in (".json", ".jinja", ".model")
    ]
    found = hashlib.sha256(known.encode())
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


@pytest.fixture(autouse=True, scope="session")
def _known_tokenizers_need_no_process() -> Iterator[None]:
    """A tokenizer that has ended well in a process of its own runs in this one from then on: forking pytest takes some
    60 ms, and a model_auto asks for rows five times."""
    from recompile.model import tokenizer

    before, known = tokenizer.run_guarded, set[str]()

    def run(work: Callable[[], Any], what: Path | str, limits: Any) -> Any:
        key = _tokenizer_files(Path(str(what).removesuffix(": the tokenizer or chat template")))
        if key in known:
            return pickle.loads(pickle.dumps(work()))
        result = before(work, what, limits)
        known.add(key)
        return result

    tokenizer.run_guarded = run
    yield
    tokenizer.run_guarded = before


@pytest.fixture
def quick_exl3(monkeypatch: pytest.MonkeyPatch) -> None:
    """EXL3 is encoded by a search that takes no time, at some more error: for tests of what is around it."""
    if importlib.util.find_spec("numba") is None:
        return
    from recompile.quantize import exl3
    from tests.quick_exl3 import near_search

    monkeypatch.setattr(exl3, "_numba_search", lambda: near_search)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, a bf16 directory: read only. Built once a machine, in the user's cache."""
    from recompile.errors import CheckpointError, OutputError

    make_base = load_script("make_base")
    try:
        make_base.find_gguf()
    except CheckpointError as error:
        pytest.skip(str(error))
    try:
        return Path(make_base.build())
    except OutputError:  # no cache can be written here
        return Path(make_base.build(tmp_path_factory.mktemp("base") / make_base.MODEL_NAME))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Two small trained models, "tiny-dense" (llama) and "tiny-moe" (qwen3_moe): read only, bf16.

    Trained once a machine, in the user's cache (two minutes on 2 cores at most); see scripts/make_tiny_models.py.
    """
    make_tiny_models = load_script("make_tiny_models")
    root = make_tiny_models.default_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        writable = os.access(root, os.W_OK)
    except OSError:
        writable = False
    if not writable and not all(make_tiny_models.is_whole(root / name) for name in make_tiny_models.NAMES):
        root = tmp_path_factory.mktemp("tiny-models")
    built: Mapping[str, Path] = make_tiny_models.build(root)
    assert set(built) == {"tiny-dense", "tiny-moe"}
    return built
