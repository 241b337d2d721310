"""`make gpu`: correctness, memory checks and a first benchmark on a machine with a GPU, in ten minutes."""
