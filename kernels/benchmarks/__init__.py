"""Timing the kernels beside what one would use instead, searching their launch configurations, and checking them.

Nothing here is imported by a model; `scripts/bench_kernels.py` and `scripts/tune_kernels.py` are the commands.
"""
