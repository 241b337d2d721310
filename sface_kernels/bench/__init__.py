"""How fast is it: providers, timing, memory, the machine, results and their pictures.

`cli/` and the scripts in `benchmarks/` only choose options and show what comes back from here.
"""
