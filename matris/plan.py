"""What a layout of ranks needs and how long a step takes, predicted from formulas and a description of the machine.

Memory is that of `janus.sharding.memory` and `matris.memory`, FLOPs and bytes of products those of `matris.cost`,
collectives those of the modules `traffic`. Time is a band, between the pessimistic and the optimistic shares of a
machine's peaks, and has four parts:

    computation    of each part of the model the larger of FLOPs over rate and bytes over bandwidth, and of all else
                   that results which backward passes want are written once and read once
    update         what AdamW, the moving average and clipping read and write
    communication  that nothing hides: features over the tensor axis, tokens to their experts, sums of gradients
    hidden         gathered weights, their gradients, and halos, which are under way while something is computed: of
                   these a share of the machine's `overlap` takes no time, as far as there is computation

`matris.plan_job.NOT_MODELLED` says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch

from janus.comm.alphabeta import Place, places, seconds
from janus.comm.traffic import PlainAxis, Traffic
from janus.expert_parallel.traffic import SiteLoad, expert_traffic, token_traffic
from janus.grid import Grid
from janus.machine import Band
from janus.sharding.logical import split_of
from janus.sharding.memory import COPIES, WeightSizes
from janus.sharding.traffic import UnitSize, WeightAxes, weight_traffic
from matris.budget import USED
from matris.config import Precision
from matris.cost import Counts, Derivatives, Part, PerPass, bytes_by_part, flops_by_part, update_bytes
from matris.layouts import Layout
from matris.memory import step_memory
from matris.model import RECOMPUTE_BYTES, MatRIS
from matris.plan_job import FORMATS, POLICIES, Job, MemoryUse, NoPlanError, Prediction, Recompute, StepTime
from matris.setup import check_ranks
from matris.traffic import RankRows, feature_traffic
from matris.train_config import ParallelConfig

_BLOCK = (Part.line_attention, Part.atom_attention, Part.line_refinement, Part.atom_refinement)
_ITEMSIZE = 4
"""Bytes of a number of features and weights."""


@dataclass
class Planner:
    """Predictions of one job for any layout. What layouts have in common is computed once."""

    job: Job
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def model(self) -> MatRIS:
        """On the meta device: shapes alone."""
        with torch.device("meta"):
            return MatRIS(self.job.hyper)

    def grid(self, layout: Layout) -> Grid:
        """The rank grid of a layout, if ranks and model allow it.

        Raises:
            NoPlanError: they do not.
        """
        try:
            grid = Grid.of(
                self.job.ranks,
                shard=layout.shard,
                graph=layout.graph,
                tensor=layout.tensor,
                expert=layout.expert,
                pipeline=1,
            )
        except ValueError as error:
            raise NoPlanError("the ranks do not divide", str(error)) from None
        key = ("complaint", layout.tensor, layout.expert, layout.placement)
        complaint = self._once(key, lambda: self._complaint(layout))
        if complaint is not None:
            raise NoPlanError("the model does not divide", complaint)
        return grid

    def predict(self, layout: Layout) -> Prediction:
        """Of a layout with any number of replicas, which the number of ranks decides.

        Raises:
            NoPlanError: it is not possible, or does not fit into the memory.
        """
        grid = self.grid(layout)
        filled = replace(layout, data=grid.data)
        own = self._own(grid)
        key = ("fitting", own, grid.shard, grid.graph, grid.tensor, grid.expert, layout.policy, layout.placement)
        micro_batch, recompute, memory = self._once(key, lambda: self._fitting(filled, own))
        return self._timed(filled, grid, recompute, memory, micro_batch)

    def least_seconds(self, layout: Layout) -> float:
        """Less than the sum of the pessimistic and the optimistic time of a step: computation, and features over the
        tensor axis, if all structures of a rank were one micro-batch and nothing else were sent. Quick: the same for
        all layouts with the same graph and tensor axes.

        Raises:
            NoPlanError: the layout is not possible.
        """
        grid = self.grid(layout)
        own = self._own(grid)

        def least() -> float:
            work = self._work(own, grid.graph, grid.tensor, "none")
            where, total = places(grid, self.job.devices_per_node), 0.0
            features = self._features(own, layout)
            for optimistic in (False, True):
                times = seconds(features, where, self.job.machine, optimistic=optimistic)
                sent = sum(time for key, time in times.items() if key not in _HIDDEN)
                total += self.job.imbalance * work.seconds(self.job, optimistic=optimistic) + sent
            return total

        return self._once(("least", own, grid.graph, grid.tensor), least)

    def _own(self, grid: Grid) -> int:
        """Structures of an update that one rank has, or several of the graph and tensor axes together: all wait for
        those that have one more than others."""
        batch_ranks = grid.data * grid.shard
        if self.job.global_batch < batch_ranks:
            raise NoPlanError(
                "fewer structures than ranks for them",
                f"{self.job.global_batch} structures per update for {batch_ranks} ranks with structures of their own: "
                "choose a larger global batch, or more graph or tensor ranks",
            )
        own = -(-self.job.global_batch // batch_ranks)
        if grid.graph > own * self.job.workload.atoms:
            raise NoPlanError(
                "more graph ranks than atoms",
                f"{grid.graph} ranks share {own * self.job.workload.atoms:.0f} atoms: choose a smaller graph axis",
            )
        return own

    # Memory ----------------------------------------------------------------------------------------------------------

    def _fitting(self, layout: Layout, own: int) -> tuple[int, Recompute, MemoryUse]:
        """The largest micro-batch with the least recomputation."""
        shared_experts = layout.expert > 1 and layout.placement == "sharded"
        policies = POLICIES if self.job.recompute is None else (self.job.recompute,)
        # Experts that are gathered as planned do not allow it, see `MatRIS.recompute_blocks`.
        policies = tuple(policy for policy in policies if not (policy == "full" and shared_experts))
        if not policies:
            raise NoPlanError(
                "recompute full with sharded experts",
                "recompute full needs experts at home (-home), or no expert axis: choose another policy",
            )
        wanted = self.job.micro_batch or 1
        if wanted > own:
            raise NoPlanError(
                "fewer structures than a micro-batch",
                f"the micro-batch is {wanted} structures, but a rank has {own} of the global batch of "
                f"{self.job.global_batch}: choose a smaller one, or a larger global batch",
            )
        for policy in policies:
            memory = self._memory(layout, wanted, policy)
            if memory.total <= memory.available:
                break
        else:
            raise NoPlanError(
                "does not fit the memory",
                f"layout {layout.name} needs {memory.total / 1e9:.4g} GB on each rank ({memory.weights / 1e9:.4g} of "
                f"weights and optimizer, {(memory.gathered + memory.experts) / 1e9:.4g} gathered or waiting, "
                f"{memory.activations / 1e9:.4g} of {wanted} structures with recompute {policy}), and "
                f"{memory.available / 1e9:.4g} GB may be used: share weights (fsdp, ep), or structures (gp)",
                needed=memory.total,
            )
        if self.job.micro_batch is not None:
            return wanted, policy, memory
        least, most = wanted, own
        while least < most:
            # Few fit as a rule: by doubling until too many are found, then between.
            middle = min(2 * least, most) if most == own else (least + most + 1) // 2
            found = self._memory(layout, middle, policy)
            if found.total <= found.available:
                least, memory = middle, found
            else:
                most = middle - 1
        even = -(-own // -(-own // least))  # as many micro-batches, of like size
        return even, policy, memory if even == least else self._memory(layout, even, policy)

    def _memory(self, layout: Layout, micro_batch: int, policy: Recompute) -> MemoryUse:
        weights = self._sizes(layout).memory(
            shards=layout.shard, expert_ranks=layout.expert, at_home=layout.placement == "fixed"
        )
        activations = self._activations(micro_batch, layout.graph, layout.expert, policy)
        experts = 0.0
        if weights.gathered_experts:
            even = -(-self.job.hyper.num_moe_experts // layout.expert)
            held = max(load.held for load, _ in self._loads(layout, micro_batch))
            experts = weights.gathered_experts * held / even
        return MemoryUse(
            weights=weights.held,
            gathered=weights.gathered + (0 if policy == "full" else weights.waiting),
            experts=experts,
            activations=activations,
            available=USED * 1e9 * self.job.machine.memory_GB,
        )

    def _activations(self, micro_batch: int, graph: int, expert: int, policy: Recompute) -> float:
        """Bytes, with borrowed rows as if they were owned."""
        return self._once(
            ("activations", micro_batch, graph, expert, policy),
            lambda: step_memory(
                self.job.hyper,
                _counts(self._rows(micro_batch, graph), with_borrowed=True),
                recompute_bytes={"none": None, "selective": RECOMPUTE_BYTES}.get(policy, 0),
                recompute_blocks=policy == "full",
                bf16=self.job.precision is Precision.bf16_mixed,
                kernels=self.job.kernels,
                expert_ranks=expert,
            ),
        )

    # Time ------------------------------------------------------------------------------------------------------------

    def _timed(
        self, layout: Layout, grid: Grid, recompute: Recompute, memory: MemoryUse, micro_batch: int
    ) -> Prediction:
        job = self.job
        where = places(grid, job.devices_per_node)
        own, mean = self._own(grid), job.global_batch / (grid.data * grid.shard)
        sizes = {micro_batch: own // micro_batch} | ({rest: 1} if (rest := own % micro_batch) else {})
        blocking, hidden = self._traffic(layout, grid, sizes)
        works = [(self._work(size, layout.graph, layout.tensor, recompute), count) for size, count in sizes.items()]
        num_updated = memory.weights / (COPIES * _ITEMSIZE)
        times = []
        for optimistic in (False, True):
            times.append(
                self._step_time(
                    sum(count * work.seconds(job, optimistic=optimistic) for work, count in works),
                    update_bytes(int(num_updated)),
                    (blocking, hidden),
                    where,
                    optimistic=optimistic,
                )
            )
        low, high = times
        flops = mean / own * sum(count * work.flops for work, count in works)
        peak = job.machine.flops_per_s(FORMATS[job.precision][0])
        efficiencies = [(mean / own * time.computation / job.imbalance + time.update) / time.step for time in times]
        traffic = Traffic()
        for part in (blocking, hidden):
            traffic.add(part)
        return Prediction(
            layout=layout,
            micro_batch=micro_batch,
            micro_batches=sum(sizes.values()),
            recompute=recompute,
            memory=memory,
            flops=flops,
            traffic=traffic,
            pessimistic=low,
            optimistic=high,
            efficiency=Band(low=min(efficiencies), high=max(efficiencies)),
            structures_per_s=Band(low=job.global_batch / low.step, high=job.global_batch / high.step),
            mfu=Band(low=flops / peak / low.step, high=flops / peak / high.step),
        )

    def _step_time(
        self,
        computation: float,
        update: float,
        traffic: tuple[Traffic, Traffic],
        where: dict[str, Place],
        *,
        optimistic: bool,
    ) -> StepTime:
        """
        Args:
            computation: seconds, without imbalance.
            update: bytes.
            traffic: that nothing hides, and that is hidden.
        """
        machine = self.job.machine
        computation *= self.job.imbalance
        memory, overlap = (
            band.high if optimistic else band.low for band in (machine.shares.memory, machine.shares.overlap)
        )
        updating = update / (1e9 * machine.memory_GB_per_s * memory)
        blocking, hidden = (sum(seconds(part, where, machine, optimistic=optimistic).values()) for part in traffic)
        exposed = hidden - overlap * min(hidden, computation)
        return StepTime(
            computation=computation,
            update=updating,
            communication=blocking,
            hidden=hidden,
            step=computation + updating + blocking + exposed,
        )

    def _work(self, micro_batch: int, graph: int, tensor: int, recompute: Recompute) -> _Work:
        def work() -> _Work:
            flops, moved = self._once(("products", micro_batch, graph), lambda: self._products(micro_batch, graph))
            # As if each rank had one expert: gradients of their weights are no results.
            expert = max(1, self.job.hyper.num_moe_experts)
            kept, left = (self._activations(micro_batch, graph, expert, policy) for policy in ("none", recompute))
            again = kept - left
            parts = []
            for part in Part:
                divided = tensor if part in _BLOCK else 1
                repeated = 2 if recompute == "full" and part in _BLOCK else 1
                parts.append((flops[part].step / divided, moved[part].step / divided, repeated))
            return _Work(parts=tuple(parts), results=2.0 * (kept + max(again, 0.0)) / tensor)

        return self._once(("work", micro_batch, graph, tensor, recompute), work)

    def _products(self, micro_batch: int, graph: int) -> tuple[dict[Part, PerPass], dict[Part, PerPass]]:
        """FLOPs and bytes of a micro-batch on one graph rank."""
        counts, hyper, asked = _counts(self._rows(micro_batch, graph)), self.job.hyper, Derivatives()
        itemsize = FORMATS[self.job.precision][1]
        return flops_by_part(hyper, counts, asked), bytes_by_part(hyper, counts, asked, itemsize=itemsize)

    # Traffic ---------------------------------------------------------------------------------------------------------

    def _traffic(self, layout: Layout, grid: Grid, sizes: Mapping[int, int]) -> tuple[Traffic, Traffic]:
        """Of a step: that which nothing hides, and that which computation may.

        Args:
            sizes: number of micro-batches, by their structures.
        """
        blocking, gathered, micro_batches = Traffic(), Traffic(), sum(sizes.values())
        blocking.add(
            self._once(
                ("weight traffic", grid, layout.policy, layout.placement, micro_batches),
                lambda: self._weight_traffic(layout, grid, micro_batches),
            )
        )
        for size, times in sizes.items():
            key = ("experts", size, layout.graph, layout.tensor, layout.expert, layout.policy, layout.placement)
            tokens, experts = self._once(key, partial(self._expert_traffic, layout, size))
            blocking.add(self._features(size, layout), times)
            blocking.add(tokens, times)
            gathered.add(experts, times)
        hidden = blocking.of(_HIDDEN)
        hidden.add(gathered)
        return blocking.of(blocking.calls.keys() - set(_HIDDEN)), hidden

    def _features(self, micro_batch: int, layout: Layout) -> Traffic:
        return self._once(
            ("features", micro_batch, layout.graph, layout.tensor),
            lambda: feature_traffic(
                self.job.hyper,
                self._rows(micro_batch, layout.graph),
                graph=PlainAxis(name="graph", size=layout.graph),
                tensor=PlainAxis(name="tensor", size=layout.tensor),
            ),
        )

    def _weight_traffic(self, layout: Layout, grid: Grid, micro_batches: int) -> Traffic:
        weights = self._sizes(layout)
        modules = self.model.sharding_units() if layout.shard > 1 else ()
        still = (self.model.atom_embedding, self.model.task_embedding)  # wherever the atoms are
        replicas = grid.data * grid.shard * grid.graph
        pieces = [-(-size // layout.expert) for size in weights.experts]
        sizes = {
            "shard": grid.shard,
            "tensor": grid.tensor,
            "replicas": replicas,
            "shard_replicas": grid.data * grid.graph,
            "expert": grid.expert,
            "expert_replicas": replicas // grid.expert,
        }
        return weight_traffic(
            [
                UnitSize.of(
                    size,
                    layout.shard,
                    itemsize=_ITEMSIZE,
                    in_force_pass=module not in still,
                )
                for module, size in zip(modules, weights.units, strict=True)
            ],
            WeightAxes(**{name: PlainAxis(name=name, size=size) for name, size in sizes.items()}),
            whole_bytes=weights.everywhere,
            expert_bytes=[sum(pieces)] if layout.placement == "fixed" and pieces else pieces,
            policy=layout.policy,
            micro_batches=micro_batches,
        )

    def _expert_traffic(self, layout: Layout, micro_batch: int) -> tuple[Traffic, Traffic]:
        """Of a micro-batch: tokens, and weights of experts."""
        tokens, experts = Traffic(), Traffic()
        axis = PlainAxis(name="expert", size=layout.expert)
        for load, times in self._loads(layout, micro_batch):
            tokens.add(token_traffic(load, axis, token_bytes=self._token_bytes), times)
            if layout.placement == "sharded":
                experts.add(self._gathers(layout, load, axis), times)
        if layout.expert > 1:  # tokens of each element, of edges and of atoms
            tokens.all_gather(axis, 1, layout.expert * 2 * 8 * self.job.hyper.num_elements)
        return tokens, experts

    def _loads(self, layout: Layout, micro_batch: int) -> list[tuple[SiteLoad, int]]:
        """Of a site of edges and one of atoms, with the number of each, if all experts are used alike."""
        if layout.expert == 1:
            return []
        rows = self._rows(micro_batch, layout.graph)
        key = ("loads", micro_batch, layout.graph, layout.tensor, layout.expert, layout.policy, layout.placement)
        layers = self.job.hyper.num_layers
        return self._once(key, lambda: [(self._load(layout, number), layers) for number in (rows.edges, rows.atoms)])

    def _load(self, layout: Layout, tokens: float) -> SiteLoad:
        """That with the fewest bytes: tokens travel to the experts' ranks, or experts to the tokens' ranks."""
        ranks, num_experts = layout.expert, self.job.hyper.num_moe_experts
        axis, copies = PlainAxis(name="expert", size=ranks), tokens * self.job.hyper.moe_router_topk

        def load(stays: float, held: float) -> SiteLoad:
            return SiteLoad(sent=copies, come=copies, stays=stays, held=held, held_by_all=ranks * held)

        def moved(load: SiteLoad) -> float:
            of_tokens = token_traffic(load, axis, token_bytes=self._token_bytes)
            return sum((of_tokens.wire_bytes + self._gathers(layout, load, axis).wire_bytes).values())

        travelling = load(copies / ranks, -(-num_experts // ranks))
        return travelling if layout.placement == "fixed" else min(travelling, load(copies, num_experts), key=moved)

    def _gathers(self, layout: Layout, load: SiteLoad, axis: PlainAxis) -> Traffic:
        hyper = self.job.hyper
        expert_bytes = _ITEMSIZE * 8 * hyper.hidden_size * hyper.moe_ffn_hidden_size // layout.tensor
        return expert_traffic(load, axis, expert_bytes=expert_bytes, policy=layout.policy)

    @property
    def _token_bytes(self) -> int:
        return _ITEMSIZE * 5 * self.job.hyper.hidden_size

    # What layouts have in common -------------------------------------------------------------------------------------

    def _sizes(self, layout: Layout) -> WeightSizes:
        shards, shares_experts = layout.shard > 1, layout.expert > 1
        return self._once(
            ("sizes", layout.tensor, shards, shares_experts),
            lambda: WeightSizes.of(
                self.model,
                self.model.sharding_units() if shards else (),
                tensor=layout.tensor,
                experts=self.model.expert_sites() if shares_experts else (),
            ),
        )

    def _rows(self, micro_batch: int, parts: int) -> RankRows:
        cutoff = self.job.hyper.pairwise_cutoff
        return self._once(
            ("rows", micro_batch, parts), lambda: self.job.workload.rows(micro_batch, parts=parts, cutoff=cutoff)
        )

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def _complaint(self, layout: Layout) -> str | None:
        """Why ranks cannot share the model; None if they can."""
        try:
            check_ranks(self.job.hyper, layout.applied(ParallelConfig()))
            self._check_tensor(layout.tensor)
        except ValueError as error:
            return str(error)
        return None

    def _check_tensor(self, tensor: int) -> None:
        """Raises ValueError if a weight, or the heads, cannot be shared by so many ranks."""
        hyper = self.job.hyper
        if hyper.num_moe_experts and not hyper.separable_attention and hyper.hidden_size // tensor % hyper.kv_channels:
            raise ValueError(
                f"{hyper.hidden_size // hyper.kv_channels} attention heads do not divide into {tensor} tensor ranks"
            )
        for name, value in self.model.named_parameters():
            split = split_of(value)
            if split is not None and value.shape[split.dim] % (split.stride * tensor):
                raise ValueError(f"{name} of {tuple(value.shape)} does not divide into {tensor} tensor ranks")


_HIDDEN = ("shard/all_gather", "shard/reduce_scatter", "graph/all_to_all")


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Of one micro-batch on one rank.

    Attributes:
        parts: FLOPs and bytes of products of each part of the model, and how often they run.
        results: bytes of results that are written and read.
    """

    parts: tuple[tuple[float, float, int], ...]
    results: float

    @property
    def flops(self) -> float:
        """Of all parts, without repetition."""
        return sum(flops for flops, _, _ in self.parts)

    def seconds(self, job: Job, *, optimistic: bool) -> float:
        """At one end of the machine's band."""
        machine = job.machine
        matrix, memory = (
            band.high if optimistic else band.low for band in (machine.shares.matrix, machine.shares.memory)
        )
        rate = matrix * machine.flops_per_s(FORMATS[job.precision][0])
        bandwidth = 1e9 * machine.memory_GB_per_s * memory
        of_products = sum(repeated * max(flops / rate, moved / bandwidth) for flops, moved, repeated in self.parts)
        return of_products + self.results / bandwidth


def _counts(rows: RankRows, *, with_borrowed: bool = False) -> Counts:
    """Whole numbers; at least one structure."""
    atoms, undirected = rows.atoms, rows.undirected
    if with_borrowed and rows.atom_halo is not None and rows.edge_halo is not None:
        atoms, undirected = atoms + rows.atom_halo.borrowed, undirected + rows.edge_halo.borrowed
    return Counts(
        structures=rows.structures,
        atoms=round(atoms),
        edges=round(2 * undirected),
        undirected=round(undirected),
        angles=round(rows.angles),
    )
