"""The procedural world that echo-tiny is trained on and measured in: scenes, scripts, captions.

What it may import: numpy only.
"""
