"""Slow imports of a rank, done once by the process that all ranks are forked from."""

import gc
import os
import warnings

os.environ["OMP_NUM_THREADS"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ase.build
    import ase.io
    import pytest
    import torch
    import torch.distributed
    from megatron.core import parallel_state
    from torch import _dynamo

    from matris import run, setup, verify

__all__ = ["_dynamo", "ase", "parallel_state", "pytest", "run", "setup", "torch", "verify"]

# What has been imported is no garbage: without this each rank looks through all of it, and so copies its pages.
gc.freeze()
