"""recompile: build mixed-bitrate checkpoints from quantized variants of one model, and measure them."""

__version__ = "0.1.0"
