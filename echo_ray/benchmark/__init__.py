"""How fast the engine is, and whether it computes what it should: a baseline of our own, a gate,
a ladder of switches, and the report. May import the engine and everything below it; knows no Ray,
no service and no store.
"""
