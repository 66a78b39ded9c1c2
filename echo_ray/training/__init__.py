"""Procedural video, the training recipe, and what made the shipped weights.

What it may import: model, engine, presets, configuration.
"""
