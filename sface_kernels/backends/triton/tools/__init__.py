"""Offline tools: what the kernels compile to, and a search for tile sizes. No call ever imports them."""
