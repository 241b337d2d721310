"""What the command and `benchmarks/` measure with: workloads, opponents, checks, timing, memory, results.

`cli/` and the scripts in `benchmarks/` only choose options and show what comes back from here.
"""
