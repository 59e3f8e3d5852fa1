"""What the name of a module says: head, embedding or layer."""

from __future__ import annotations

HEAD_NAMES = ("lm_head", "output", "embed_out")
EMBEDDING_NAMES = ("embed_tokens", "wte", "tok_embeddings", "embed_in", "word_embeddings", "token_embd")


def role_of(module: str) -> str:
    """ "head", "embedding" or "layer": which bitrate a module counts in."""
    leaf = module.rpartition(".")[2]
    if leaf in HEAD_NAMES:
        return "head"
    return "embedding" if leaf in EMBEDDING_NAMES else "layer"
