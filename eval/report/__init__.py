"""The report: one self-contained page with the recipe explorer, pictures, and a block for model cards."""
