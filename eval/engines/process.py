"""The parent's side of an engine: asks a worker process for logits, tokens and quantized files."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.engines.builds import EngineError, Installed
from eval.engines.pipe import Worker
from recompile.formats.cache_types import CacheFormat
from recompile.formats.gguf_types import find_type

ROOT = Path(__file__).resolve().parents[2]  # what holds the packages `eval` and `recompile`


@dataclass(frozen=True)
class EngineModel:
    """What the engine says of a loaded file."""

    n_vocab: int
    add_bos: bool
    bos: int
    n_ctx_train: int
    description: str
    batch_tokens: int  # rows of logits that come in one block


class Engine:
    """One worker process with one library; `with Engine(find_engine("llama.cpp")) as engine: ...`.

    threads: of the engine; default: OMP_NUM_THREADS, else the processors this process may use, at most 8
    """

    def __init__(self, installed: Installed, *, threads: int | None = None) -> None:
        self.installed = installed
        self.threads = threads or default_threads()
        self.model: EngineModel | None = None
        environment = dict(os.environ)
        # A second pool of threads that spins while it waits costs more than it gives on a shared machine.
        environment |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(self.threads)}
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from eval.engines.worker import main; main()"
        self._worker = Worker(installed.label, [sys.executable, "-c", code], environment)

    def __enter__(self) -> Engine:
        self._worker.__enter__()
        build = self.installed.build
        try:
            self._worker.ask(
                do="open",
                library=str(self.installed.library),
                preload=list(build.preload) if build else _neighbours(self.installed.library),
                layout=asdict(build.layout) if build else None,
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.__exit__()

    def load(self, path: Path | str, n_ctx: int, cache: CacheFormat | None = None) -> EngineModel:
        """Load a GGUF file (the first of its splits) with a context of n_ctx tokens.

        cache: what keys and values are stored in, with flash attention on; None: the engine's default, f16

        Raises EngineError with the engine's own words where it refuses.
        """
        if not Path(path).is_file():
            raise EngineError(f"{path}: there is no such file; the engine reads a GGUF file")
        types = None if cache is None else [find_type(kind).type_id for kind in (cache.keys, cache.values)]
        found = self._worker.ask(do="load", path=str(path), n_ctx=n_ctx, threads=self.threads, cache=types)
        self.model = EngineModel(**{key: found[key] for key in EngineModel.__dataclass_fields__})
        return self.model

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text as llama-perplexity takes them: the model's special tokens added, none read in the text."""
        return list(self._worker.ask(do="tokenize", text=text)["tokens"])

    def logits(self, tokens: Sequence[int], first: int = 0, last: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Logits of one sequence at the positions first <= i < last: blocks of float32 [positions, n_vocab], in order.

        The sequence has at most the n_ctx tokens that the model was loaded with.
        """
        assert self.model is not None, "load a model first"
        last = len(tokens) if last is None else last
        self._worker.send(do="logits", tokens=[int(token) for token in tokens], first=first, last=last)
        while size := int(self._worker.receive().get("bytes", 0)):
            data = self._worker.read(size)
            yield np.frombuffer(data, np.float32).reshape(-1, self.model.n_vocab)

    def quantize(
        self,
        source: Path | str,
        target: Path | str,
        ftype: int,
        *,
        tensor_types: Sequence[tuple[str, int]] = (),
        output_type: int | None = None,
        embedding_type: int | None = None,
        importance: Mapping[str, NDArray[np.float32]] | None = None,
        allow_requantize: bool = False,
        pure: bool = False,
    ) -> None:
        """The engine's own quantizer (`llama_model_quantize`; mainline only), e.g. ftype 15 for Q4_K_M.

        tensor_types: (regex that is searched in the tensor name, ggml type), first match wins; without `pure` only
        importance:   tensor name -> [ne0] or [experts, ne0], per column
        """
        if self.installed.build is None or not self.installed.build.quantizes:
            raise EngineError(f"{self.installed.label}: its quantizer cannot be called through C structs")
        with tempfile.TemporaryDirectory() as folder:
            request: dict[str, Any] = {}
            if importance:
                entries, start, path = [], 0, Path(folder) / "importance"
                with path.open("wb") as file:
                    for name, values in importance.items():
                        flat = np.ascontiguousarray(values, np.float32).ravel()
                        file.write(flat.tobytes())
                        entries.append((name, start, flat.size))
                        start += flat.size
                request["importance"] = {"file": str(path), "entries": entries}
            self._worker.ask(
                do="quantize",
                source=str(source),
                target=str(target),
                ftype=ftype,
                threads=self.threads,
                tensor_types=[[pattern, number] for pattern, number in tensor_types],
                output_type=output_type,
                embedding_type=embedding_type,
                allow_requantize=allow_requantize,
                pure=pure,
                **request,
            )


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, else the processors that this process may use, at most 8."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if stated.isdigit() and int(stated) > 0:
        return int(stated)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)


def _neighbours(library: Path) -> list[str]:
    """ggml's libraries beside a user's libllama, which need RTLD_GLOBAL and to come first."""
    found: list[str] = []
    for stem in ("libggml-base", "libggml"):
        for ending in (".so", ".so.0", ".dylib"):
            if (library.parent / f"{stem}{ending}").is_file():
                found.append(f"{stem}{ending}")
                break
    return found
