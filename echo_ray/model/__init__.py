"""Weights and maths of the video model; modules hold weights and never a session's state.

What it may import: torch, echo_kernels, presets, configuration, errors.
"""
