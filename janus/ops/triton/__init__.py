"""Triton kernels of the functions in `janus.ops`: one pass over memory where torch makes one per operation."""
