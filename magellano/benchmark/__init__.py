"""Measurements of single operations: each against its reference formulation, what one would otherwise run, and this
machine's own ceilings, all in one run. `magellano benchmark NAME` calls `run()` of the module of that name.
"""
