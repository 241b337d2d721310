"""What writes into this repository: `accuracy` measures errors against float64, `tables` writes the results into the
documents, `gpu` runs all that needs a GPU, `micro/` holds microbenchmarks for pytest-benchmark.

They measure with `sface_kernels.bench` and `sface_kernels.testing`.
"""
