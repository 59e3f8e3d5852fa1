"""How good a checkpoint is: KL divergence, perplexity, and the layer-swap profile."""
