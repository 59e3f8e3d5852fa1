"""Whole mixes measured."""
