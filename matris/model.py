"""MatRIS: from a batch of structures to energies, forces, stress and magnetic moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from janus.comm.adjoint import copy, reduce
from janus.mesh import Mesh
from janus.ops.expansion import polynomial_envelope
from janus.ops.recompute import recomputing
from janus.ops.segment import segment_sum
from matris.basis.radial import build_radial_basis
from matris.blocks.compiled import CompiledBlocks
from matris.blocks.edges import EdgeSet, Rows
from matris.blocks.embedding import AngleEmbedding, AtomEmbedding, EdgeEmbedding, TaskEmbedding
from matris.blocks.geometry import measure
from matris.blocks.interaction import Connectivity, InteractionBlock, make_again
from matris.blocks.module import ExpertOptions, Layers, MatRISConfig, MegatronModule
from matris.blocks.moe import RoutedExperts, plan_sites
from matris.config import ModelConfig, Precision
from matris.elements import MAX_Z, SYMBOLS
from matris.graph.batch import GraphBatch
from matris.readout import Readout


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of a batch of G structures with N atoms. All tensors are float64.

    Attributes:
        energies: (N,) interaction energy of each atom, eV, without reference energies.
        interaction_energy: (G,) their sums, eV.
        reference_energy: (G,) sums of the atomic reference energies, eV.
        forces: (N, 3) -dE/dr, eV/A; None if not asked for.
        stress: (G, 3, 3) dE/dstrain / |volume|, eV/A^3, positive when tensile; NaN where the cell has no volume; None
            if not asked for.
        magmoms: (N,) Bohr magnetons, not negative; None if the model was not trained on them.
    """

    energies: Tensor
    interaction_energy: Tensor
    reference_energy: Tensor
    forces: Tensor | None
    stress: Tensor | None
    magmoms: Tensor | None

    @property
    def energy(self) -> Tensor:
        """(G,) total energies, eV."""
        return self.interaction_energy + self.reference_energy


RECOMPUTE_BYTES = 1 << 21
"""Results that stay in a processor's cache cost less to keep than to make again."""


class MatRIS(MegatronModule):
    """The MatRIS potential (arXiv 2603.02002).

    Args:
        config: hyper-parameters.
        precision: number formats; parameters are fp64 for `fp64` and fp32 otherwise. `tf32` does not change the module:
            it is the format in which CUDA forms fp32 products, set by the run.
        seed: of the initial weights, which are the same for every mesh; None takes torch's current generator state.
        mesh: ranks that share the model. Over its tensor axis each holds a part of the large weights; over its graph
            axis all hold the same weights and predict the same batch, each its own atoms; over its expert axis they
            share the experts, and all predict together, each its own batch.
        experts: how the ranks of its expert axis share the experts.

    Raises:
        ValueError: the width does not divide by the tensor axis.

    Attributes:
        reference_energies: (num_elements,) eV per atom of Z = 1, 2, ..., float64, not trained; with tasks
            (tasks, num_elements).
        energy_scale: () eV, multiplies the readout's energies, not trained; with tasks (tasks,).
        predicts_magmoms: whether the head for magnetic moments is trained; without it they are not reported.
        elements: atomic numbers that the model was trained on, ascending; all that it has weights for unless training
            narrows them.
        elements_of_task: the same for each task by name.
        recompute: the policy (`set_recompute`), of which the next two are parts.
        recompute_bytes: results of so many bytes, if they are cheap, are made again in backward passes and not kept
            (`janus.ops.recompute`); None keeps all.
        recompute_blocks: of interaction blocks nothing is kept but their inputs (`janus.blockwise.again`).
    """

    energy_scale: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        precision: Precision = Precision.fp32,
        seed: int | None = None,
        mesh: Mesh | None = None,
        experts: ExpertOptions | None = None,
    ) -> None:
        mesh = mesh or Mesh()
        dtype = torch.float64 if precision is Precision.fp64 else torch.float32
        megatron_config = MatRISConfig(
            model=config,
            mesh=mesh,
            experts=experts or ExpertOptions(),
            tensor_model_parallel_size=mesh.tensor.size,
            context_parallel_size=mesh.graph.size,
            params_dtype=dtype,
            matmul_dtype=torch.bfloat16 if precision is Precision.bf16_mixed else None,
            use_cpu_initialization=True,
        )
        super().__init__(megatron_config)
        self.hyper = config
        self.mesh = mesh
        self.precision = precision
        self.predicts_magmoms = True
        self.recompute = "selective"
        self.recompute_bytes: int | None = RECOMPUTE_BYTES
        self.elements: tuple[int, ...] = tuple(range(1, config.num_elements + 1))
        self.elements_of_task: dict[str, tuple[int, ...]] = dict.fromkeys(config.tasks, self.elements)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.atom_embedding = AtomEmbedding(megatron_config)
            self.edge_embedding = EdgeEmbedding(megatron_config)
            self.angle_embedding = AngleEmbedding(megatron_config)
            self.blocks = Layers(
                InteractionBlock(megatron_config, is_last=index == config.num_layers - 1)
                for index in range(config.num_layers)
            )
            self.readout = Readout(megatron_config)
            # Last, so that all others begin as they would without it.
            self.task_embedding = TaskEmbedding(megatron_config) if config.tasks else None
        self.pair_basis = build_radial_basis(config, config.pairwise_cutoff)
        self.line_basis = build_radial_basis(config, config.three_body_cutoff)
        self.to(dtype)
        by_task = (len(config.tasks),) if config.tasks else ()
        self.reference_energies = nn.Parameter(
            torch.zeros(*by_task, config.num_elements, dtype=torch.float64), requires_grad=False
        )
        self.register_buffer("energy_scale", torch.ones(by_task, dtype=torch.float64))

    def forward(
        self, batch: GraphBatch, *, forces: bool = True, stress: bool = True, create_graph: bool = False
    ) -> Prediction:
        """Predict a batch. Over a graph axis all of its ranks call it, each with its part of the same batch.

        Forces, atomic energies and magnetic moments are then those of the part; energies and stress are the whole
        structures', on every rank.

        Args:
            forces, stress: whether to differentiate for them.
            create_graph: record the derivatives, so that a loss of forces and stress has weight gradients. Without it
                the prediction is detached. Works under `torch.no_grad` as well.
        """
        recording = torch.enable_grad() if forces or stress else torch.set_grad_enabled(create_graph)
        with recording, recomputing(self.recompute_bytes):
            positions = batch.positions.detach().requires_grad_(forces)
            strain = torch.zeros_like(batch.cell).requires_grad_() if stress else None
            energies, magmoms = self._atomic(
                batch, positions, None if strain is None else copy(strain, self.mesh.graph)
            )
            interaction_energy = self._per_structure(energies, batch)
            leaves = [leaf for leaf, wanted in ((positions, forces), (strain, stress)) if wanted and leaf is not None]
            gradients = list(_gradients(interaction_energy, leaves, create_graph=create_graph))
            force = -gradients.pop(0) if forces else None
            virial = gradients.pop(0) if stress else None
            prediction = Prediction(
                energies=energies,
                interaction_energy=interaction_energy,
                reference_energy=self._per_structure(self.reference_of_atoms(batch), batch),
                forces=force,
                stress=None if virial is None else _per_volume(virial, batch.cell),
                magmoms=magmoms if self.predicts_magmoms else None,
            )
        return prediction if create_graph else _detached(prediction)

    def set_recompute(self, policy: str) -> None:
        """`none`, `selective`, `all` or `full`, as `training.recompute` has it; before the weights are shared out.

        Raises:
            ValueError: not with experts that are gathered as planned.
        """
        self.recompute = policy
        self.recompute_bytes = {"none": None, "selective": RECOMPUTE_BYTES}.get(policy, 0)
        self.recompute_blocks = policy == "full"

    @property
    def can_recompute_blocks(self) -> bool:
        """Whether all weights of a block are there while it runs."""
        return all(site.axis.size == 1 or site.has_homes for site in self.expert_sites())

    @property
    def recompute_blocks(self) -> bool:
        """See the class; to be set before the weights are shared out."""
        return self._interaction_blocks()[0].whole.make_passes is make_again

    @recompute_blocks.setter
    def recompute_blocks(self, wanted: bool) -> None:
        if wanted and not self.can_recompute_blocks:
            raise ValueError(
                "whole blocks are to be recomputed (training.recompute full), which experts that are gathered as "
                "planned do not allow: give them homes (parallel.expert_placement fixed), or take training.recompute "
                "all"
            )
        for block in self._interaction_blocks():
            block.whole.make_passes = make_again if wanted else None

    def compile_blocks(self, *, or_plain: bool) -> None:
        """Computes all passes of the interaction blocks by compiled programs, which are made at the first batch.

        Of blocks with experts the atom attention is left to autograd, for which rows an expert gets depends on the
        batch.

        Args:
            or_plain: go on without them, with a warning, where that fails.

        Raises:
            ValueError: over a tensor or graph axis.
        """
        make_passes = CompiledBlocks(self.config, or_plain=or_plain)
        for block in self._interaction_blocks():
            for part in (block.lines, block.refinements) if block.has_experts else (block.whole,):
                part.make_passes = make_passes

    def _interaction_blocks(self) -> list[InteractionBlock]:
        return [block for block in self.blocks if isinstance(block, InteractionBlock)]

    def reference_of_atoms(self, batch: GraphBatch) -> Tensor:
        """Reference energies (N,), eV."""
        if self.task_embedding is None:
            return self.reference_energies[batch.numbers - 1]
        return self.reference_energies[batch.task[batch.structure_index], batch.numbers - 1]

    def _per_structure(self, values: Tensor, batch: GraphBatch) -> Tensor:
        """Sums (G,) over the atoms (N,) of all ranks of the graph axis."""
        return reduce(segment_sum(values, batch.structure_index, batch.num_structures), self.mesh.graph)

    def _atomic(self, batch: GraphBatch, positions: Tensor, strain: Tensor | None) -> tuple[Tensor, Tensor]:
        """Interaction energies (N,) and magnetic moments (N,), float64."""
        axis = self.mesh.graph
        atom_rows = Rows.of(batch.num_atoms, batch.atom_halo, axis)
        edge_rows = Rows.of(batch.num_undirected, batch.edge_halo, axis)
        geometry = measure(batch, positions, strain, self.config.params_dtype, atom_rows)
        pair_basis, line_basis = self.pair_basis(geometry.length), self.line_basis(geometry.length)
        graph = self._connectivity(batch, geometry.length, pair_basis, line_basis, atom_rows, edge_rows)
        if self.mesh.expert.size > 1:
            at_target = graph.element.index_select(0, batch.edge_target)
            plan_sites(self.expert_sites(), self.hyper.num_layers * (at_target, graph.element))
        atoms = self.atom_embedding(batch.numbers)
        if self.task_embedding is not None:
            atoms = atoms + self.task_embedding(batch).index_select(0, batch.structure_index)
        edges = self.edge_embedding(pair_basis[: edge_rows.owned])
        angles = self.angle_embedding(geometry.cosine)
        for block in self.blocks:
            atoms, edges, angles = block(atoms, edges, angles, graph)
        energies, magmoms = self.readout(atoms)
        scale = (
            self.energy_scale if self.task_embedding is None else self.energy_scale[batch.task[batch.structure_index]]
        )
        return scale * energies.double(), magmoms.double()

    def _connectivity(
        self,
        batch: GraphBatch,
        length: Tensor,
        pair_basis: Tensor,
        line_basis: Tensor,
        atom_rows: Rows,
        edge_rows: Rows,
    ) -> Connectivity:
        hyper, tensor = self.hyper, self.mesh.tensor
        pair = polynomial_envelope(length, hyper.pairwise_cutoff, hyper.envelope_exponent)[:, None]
        line = polynomial_envelope(length, hyper.three_body_cutoff, hyper.envelope_exponent)[:, None]
        angle_envelope = line.index_select(0, batch.angle_target) * line.index_select(0, batch.angle_source)
        # Each tensor rank multiplies envelopes and bases with channels of its own.
        return Connectivity(
            atom_graph=EdgeSet(
                targets=Rows.of(batch.num_atoms, None, self.mesh.graph),
                sources=atom_rows,
                features=edge_rows,
                target=batch.edge_target,
                source=batch.edge_source,
                undirected=batch.edge_undirected,
                envelope=copy(pair, tensor).index_select(0, batch.edge_undirected),
            ),
            line_graph=EdgeSet(
                targets=edge_rows,
                sources=edge_rows,
                features=Rows.of(batch.num_angles, None, self.mesh.graph),
                target=batch.angle_target,
                source=batch.angle_source,
                undirected=None,
                envelope=copy(angle_envelope, tensor),
            ),
            element=batch.numbers - 1,
            angle_center=batch.angle_center,
            pair_basis=copy(pair_basis, tensor),
            line_basis=copy(line_basis, tensor),
        )

    def num_active_parameters(self) -> int:
        """Parameters that serve one atom: all but those of the experts that its element does not use."""
        hyper = self.hyper
        unused = hyper.num_moe_experts - hyper.moe_router_topk
        idle = sum(
            value.numel() // hyper.num_moe_experts * unused
            for module in self.expert_sites()
            for value in module.parameters(recurse=False)
        )
        return sum(value.numel() for value in self.parameters()) - idle

    def expert_sites(self) -> tuple[RoutedExperts, ...]:
        """In order of use: in each block that of the edges' messages, then that of the atoms' updates."""
        return tuple(module for module in self.modules() if isinstance(module, RoutedExperts))

    def sharding_units(self) -> tuple[nn.Module, ...]:
        """The modules whose parameters are sharded, each as one flat buffer, in order of use."""
        of_tasks = () if self.task_embedding is None else (self.task_embedding,)
        return (self.atom_embedding, *of_tasks, self.edge_embedding, self.angle_embedding, *self.blocks, self.readout)

    def set_reference_energies(self, energies: Mapping[int, float], task: str | None = None) -> None:
        """Set reference energies, eV per atom by atomic number; elements that are not named keep theirs.

        Args:
            task: one of the model's, if it has any.

        Raises:
            ValueError: an unknown task, or none where the model has some; an atomic number without a weight.
        """
        row, tables = self.task_number(task), self.reference_energies.data
        table = tables[row] if self.hyper.tasks else tables
        for number, energy in energies.items():
            if not 1 <= number <= self.hyper.num_elements:
                raise ValueError(
                    f"reference energy for atomic number {number}: allowed are 1 to {self.hyper.num_elements}"
                )
            table[number - 1] = energy

    def task_number(self, task: str | None) -> int:
        """Of a task of this model; 0 for None where it has no tasks.

        Raises:
            ValueError: naming the tasks that there are.
        """
        known = self.hyper.tasks
        if task is None and not known:
            return 0
        if not known:
            raise ValueError(f"task is {task!r}: this model has one task without a name; leave task away")
        if task not in known:
            given = "no task is given" if task is None else f"task is {task!r}"
            raise ValueError(f"{given}: this model has learned several levels of theory; choose {', '.join(known)}")
        return known.index(task)

    def check_elements(self, numbers: Iterable[int], task: str | None = None) -> None:
        """Refuse elements that the model was not trained on: it would give numbers without meaning for them.

        Args:
            numbers: atomic numbers, in any order and as often as they occur.
            task: with which they must have been there; None for any.

        Raises:
            ValueError: naming the elements that are not known, and those that are.
        """
        known = self.elements if task is None else self.elements_of_task[task]
        if not known:
            raise ValueError(
                f"task {task} has no elements in this model, which was pruned to "
                f"{', '.join(SYMBOLS[number] for number in self.elements)}: choose another task, or the whole model"
            )
        unseen = sorted({int(number) for number in numbers} - set(known))
        if unseen:
            names = [SYMBOLS[number] if 1 <= number <= MAX_Z else f"Z={number}" for number in unseen]
            there = "" if task is None else f" in task {task}"
            raise ValueError(
                f"the model was not trained on {', '.join(names)}{there}: it knows "
                f"{', '.join(SYMBOLS[number] for number in known)}; leave out structures with "
                "other elements, or fine-tune the model on data that has them"
            )


def _gradients(energy: Tensor, leaves: list[Tensor], *, create_graph: bool) -> tuple[Tensor, ...]:
    """dE/dleaf of the summed energy; zero for leaves that it does not depend on (isolated atoms have no edges)."""
    if not leaves:
        return ()
    if not energy.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(energy.sum(), leaves, create_graph=create_graph, materialize_grads=True)


def _per_volume(virial: Tensor, cell: Tensor) -> Tensor:
    volume = torch.linalg.det(cell).abs()[:, None, None]
    return torch.where(volume > 0, virial / volume.where(volume > 0, 1.0), torch.nan)


def _detached(prediction: Prediction) -> Prediction:
    values: dict[str, Any] = {
        name: None if value is None else value.detach() for name, value in vars(prediction).items()
    }
    return Prediction(**values)
