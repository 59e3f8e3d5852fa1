"""A base and a recipe resolved to placements, checked and written."""
