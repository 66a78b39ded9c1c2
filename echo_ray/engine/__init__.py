"""One device, many sessions: `open, step, save, load`. No network, no Ray.

What it may import: the model and session rooms.
"""
