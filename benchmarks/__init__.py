"""Benchmarks of the SFace loss: `bench_loss` times, `density` sweeps the share of active pairs, `accuracy` measures errors
against float64, `tables` writes the results into the documents, `test_*.py` are microbenchmarks for pytest-benchmark.

What they measure with is `sface_kernels.bench`.
"""
