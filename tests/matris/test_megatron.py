"""The model lives in a Megatron job: Megatron modules, its sharded state dict, its configuration."""

import os
import subprocess
import sys

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import nn

from tests.matris.structures import tiny_model

SCRIPT = """
import torch
from megatron.core import parallel_state
torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method="tcp://127.0.0.1:0")
parallel_state.initialize_model_parallel()
from tests.matris.structures import tiny_model
model = tiny_model()
sharded = model.sharded_state_dict()
state = model.state_dict()
assert set(sharded) == set(state), set(sharded) ^ set(state)
for name, value in state.items():
    assert sharded[name].key == name
    assert torch.equal(sharded[name].data, value)
print("sharded", len(state))
"""


def test_layers_are_megatron_modules():
    model = tiny_model()
    layers = (MegatronModule, ColumnParallelLinear, RowParallelLinear, nn.Linear)
    for name, module in model.named_modules():
        has_own = any(True for _ in module.parameters(recurse=False))
        assert isinstance(module, (*layers, nn.ModuleList)) or "basis" in name, name
        assert not has_own or isinstance(module, layers) or "basis" in name, name
    model.set_is_first_microbatch()


def test_sharded_state_dict_has_every_weight():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert f"sharded {len(tiny_model().state_dict())}" in result.stdout


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = tiny_model(seed=7).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    second = tiny_model(seed=7).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = tiny_model(seed=8).state_dict()
    assert not torch.equal(first["atom_embedding.table"], other["atom_embedding.table"])
