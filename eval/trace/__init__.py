"""Rows that a model wrote itself: prompts, the generation, and the file that holds them with their roles."""
