"""A transformers model run layer by layer; tokens and activations."""
