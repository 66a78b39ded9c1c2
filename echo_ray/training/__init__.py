"""Procedural video, the training recipe, and what made the shipped weights.

What it may import: scenes, engine, weights, model, presets, configuration.
"""
