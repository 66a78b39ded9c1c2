"""The Ray Serve shell: router, replicas, telemetry, the application builder. Never torch.

What it may import: everything below it. It executes what `session/` decides.
"""
