"""Is it right: the truth in float64, workloads, budgets of errors, and the published loss. `sface-kernels check` and
the tests share it; nothing of the product imports it."""
