"""Instruments: parity with the reference's numbers, and measures of what the model makes.

What it may import: model, engine, scenes, presets, configuration.
"""
