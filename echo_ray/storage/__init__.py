"""Bytes and ownership at rest: session directory, control log, snapshots; one contract.

What it may import: the session room, configuration, clock, errors. Only here: databases.
"""
