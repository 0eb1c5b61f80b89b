"""C++ kernels for CPUs, with the same arguments and results as the functions of `janus.ops` that they stand for.

Inductor's kernels go over whole tensors once for each sum over channels, and form exponentials again for every use;
here a row is read once and stays in the first cache.
"""
