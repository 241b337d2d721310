"""Benchmarks of the SFace loss: workloads, opponents, providers, timing, memory, and the commands on top.

`python -m benchmarks.bench_loss` times, `python -m benchmarks.density` sweeps the share of active pairs and
`python -m benchmarks.accuracy` measures errors against float64.
"""
