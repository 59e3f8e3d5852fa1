"""Searches for a recipe that need the models."""
