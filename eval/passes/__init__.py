"""Backward passes through a streamed model."""
