"""The kernels: @triton.jit functions and nothing else. Each file opens with what it reads, writes and never makes."""
