"""Decisions: pure functions and values of a session's life.

What lives here: session records, the control log's rules, leases, placement, pacing, replay plans,
the snapshot format. What it may import: errors and configuration. No clock, socket, database, Ray
or torch: time is an argument, effects are return values.
"""
