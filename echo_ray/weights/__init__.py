"""Weights at rest: the converted folder, the published containers, and the way between them.

Imports: model, preset, config, errors.
"""
