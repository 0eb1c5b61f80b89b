"""What an import of Megatron's modules leaves behind, and what it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from janus.megatron_import import megatron_import

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_compiler_is_not_loaded() -> None:
    code = (
        "import sys, janus.expert_parallel, matris.model; print(*[name for name in sys.modules if '_inductor' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch._inductor.compile_fx" not in done.stdout.split()


def test_functions_are_compiled_by_their_first_call(monkeypatch) -> None:
    calls = []

    def compile_now(function, **options):
        calls.append(options)
        return lambda x: 2 * function(x)

    monkeypatch.setattr(torch, "compile", compile_now)
    with megatron_import():

        @torch.compile
        def plain(x: float) -> float:
            return x + 1.0

        @torch.compile(dynamic=True)
        def chosen(x: float) -> float:
            return x + 2.0

    assert torch.compile is compile_now
    assert calls == []
    assert (plain(1.0), plain(2.0), chosen(1.0)) == (4.0, 6.0, 6.0)
    assert calls == [{}, {"dynamic": True}]
    assert (plain.__name__, chosen.__name__) == ("plain", "chosen")
