"""GGUF files: the container, the names of tensors, and the Hugging Face config that the keys of a file amount to.

Below `recompile.checkpoint`, which opens a GGUF file like any model directory.
"""
