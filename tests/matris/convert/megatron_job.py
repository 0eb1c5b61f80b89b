"""A Megatron job of one rank, run as a script: `save DIR` or `load DIR MODEL_DIRECTORY`.

`save` writes the tiny model with experts through Megatron's own `dist_checkpointing`; `load` reads `DIR` with it into a
model of other weights, and compares with a model directory.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(verb: str, directory: str, model_directory: str = "") -> None:
    import torch

    # Megatron's writer synchronises with a CUDA device, whether there is one or not.
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method="tcp://127.0.0.1:0")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from matris.exported import load_model
    from tests.matris.structures import EXPERTS, tiny_model

    parallel_state.initialize_model_parallel()
    model = tiny_model(EXPERTS, seed=4)
    if verb == "save":
        Path(directory).mkdir()
        content = {"model": model.sharded_state_dict(), "iteration": 12, "checkpoint_version": 3.0}
        dist_checkpointing.save(content, directory)
        print("saved")
        return
    found = dist_checkpointing.load({"model": model.sharded_state_dict()}, directory, strict=StrictHandling.RAISE_ALL)
    expected = load_model(model_directory).state_dict()
    assert found["model"].keys() == expected.keys()
    assert all(torch.equal(found["model"][name], value) for name, value in expected.items())
    assert not torch.equal(tiny_model(EXPERTS, seed=4).atom_embedding.table, expected["atom_embedding.table"])
    print("loaded", len(expected))


if __name__ == "__main__":
    main(*sys.argv[1:])
