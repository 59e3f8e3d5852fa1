"""A tied flag with another stored head: what each engine runs, said in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from recompile.checkpoint.checkpoint import Checkpoint, StoredModule
from recompile.checkpoint.module_names import role_of
from recompile.checkpoint.safetensors_files import read_tensor
from recompile.formats import FORMATS


@dataclass(frozen=True)
class TiedHead:
    """An output head that is stored although the config says that the embedding is the head.

    is_copy: its values are the embedding's
    """

    module: str
    format: str
    is_copy: bool

    def __str__(self) -> str:
        flag = "tie_word_embeddings is true"
        if self.is_copy:
            return f"{flag}, and {self.module} is stored with the embedding's values: every engine runs the same head"
        quantized = self.format != "dense"
        stored = f"as {self.format}" if quantized else "with other values than the embedding's"
        runs = "model_diff runs" if quantized else "transformers and model_diff run"
        return (
            f"{flag}, and {self.module} is stored {stored}: {runs} the stored head, vLLM and SGLang drop it and run "
            f"the embedding; set tie_word_embeddings to false if this head is meant, else remove it"
        )


def find_tied_head(checkpoint: Checkpoint) -> TiedHead | None:
    """The head that engines disagree about, or None. Reads both where they are dense and of one shape and dtype.

    Of one whose engine runs the stored head whatever the flag says, as EXL2's does, nothing is said."""
    text = checkpoint.config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    if not checkpoint.config.get("tie_word_embeddings", nested):  # transformers asks the outer one
        return None
    head = stored_head(checkpoint.modules)
    if head is None or FORMATS[head.format].runs_stored_head:
        return None
    return TiedHead(head.name, head.format, _is_copy(head, _of_role(checkpoint.modules, "embedding")))


def stored_head(modules: Mapping[str, StoredModule]) -> StoredModule | None:
    """The output head that is stored, or None where the embedding is the head. Of BERT and its relatives a bias of the
    head may be stored alone."""
    return _of_role(modules, "head")


def _of_role(modules: Mapping[str, StoredModule], role: str) -> StoredModule | None:
    """The first that has a weight."""
    found = (module for name, module in modules.items() if role_of(name) == role)
    return next((module for module in found if module.is_quantized or "weight" in module.parts), None)


def _is_copy(head: StoredModule, embedding: StoredModule | None) -> bool:
    if embedding is None or head.is_quantized or embedding.is_quantized:
        return False
    one, other = head.parts.get("weight"), embedding.parts.get("weight")
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    import torch

    return torch.equal(read_tensor(one).view(torch.uint8), read_tensor(other).view(torch.uint8))
