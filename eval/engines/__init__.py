"""The real engines, each in a process of its own: what their logits say about a file."""
