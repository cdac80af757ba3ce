"""Steps of the optimizer at a roll's gradients, forwards and backwards. Clipping, noise and hooks
turn a gradient g into ĝ; Φ maps (θ, h, ĝ; u) to the next (θ, h)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rhc.errors import Unseen
from rhc.hypergradient.evaluation import Evaluation
from rhc.hypergradient.states import Before
from rhc.optimizers import Fold, Vjp
from rhc.optimizers.base import cast_like
from rhc.training.hooks import Hook, through
from rhc.training.plant import Plant
from rhc.training.trajectory import Block, BlockState, Trajectory

STRETCH = 1e-3
"""Relative change of a gradient's length that tests what a hook does."""

SAME_SLOPE = 0.05
"""Largest difference of a hook's two slopes, relative to gradients: kinks of a clamp stay below."""


@dataclass
class Costate:
    """λ = dJ/ds per block, for θ and the optimizer's state, and by name for b; None is zero."""

    parameters: list[Tensor | None]
    optimizer: list[list[Tensor | None]]
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def norms(self) -> tuple[list[Tensor], list[Tensor]]:
        """Euclidean norms (of dJ/dθ, of the rest). Slots have units of their own: Adam's v at 0 has
        a huge slope."""
        theta = [t for t in self.parameters if t is not None]
        rest = [t for h in self.optimizer for t in h if t is not None]
        parts = [*theta, *rest, *self.statistics.values()]
        found = torch._foreach_norm(parts) if parts else ()
        return list(found[: len(theta)]), list(found[len(theta) :])

    def parameter_norm(self, plant: Plant) -> Tensor:
        """|dJ/dθ|, a float64 scalar; over all ranks where parameters are sharded."""
        return plant.parallel.norm_of_parts(euclidean(self.norms()[0]))


def euclidean(parts: Sequence[Tensor]) -> Tensor:
    """√Σ x² of scalars, in float64."""
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    device = parts[0].device
    return torch.linalg.vector_norm(torch.stack([p.to(device, torch.float64) for p in parts]))


class OptimizerSteps:
    """The optimizer's steps of a roll. gradient: control -> (K, groups) float64, dJ/d(the
    schedule's value), which `vjp` adds to."""

    def __init__(
        self,
        plant: Plant,
        trajectory: Trajectory,
        controls: Sequence[str],
        checked: Sequence[int],
    ) -> None:
        """checked: the steps at which hooks of parameters are compared with differences."""
        self.plant, self.trajectory = plant, trajectory
        self.differentiable = plant.differentiable
        self.blocks: tuple[Block, ...] = trajectory.blocks
        self.controls, self.checked = tuple(controls), checked
        steps = len(trajectory)
        self.values = [trajectory.schedule.at(trajectory.start + i) for i in range(steps)]
        self.groups = plant.optimizer.param_groups
        self.hooks = {} if trajectory.hooks is None else trajectory.hooks.of_tensors
        self._clips = plant.clip_norm is not None or plant.clip_value is not None
        # On the device until the end: copying to the host would synchronise at every step.
        self.device = plant.parameters[0].device
        # One matrix each: small long-lived tensors among large short-lived ones would pin the heap.
        self.gradient = {
            name: torch.zeros(steps, len(self.groups), dtype=torch.float64, device=self.device)
            for name in controls
        }
        # Numbers on a CPU cost a tenth of small tensors.
        self._numbers = {
            n: of_control.numpy()
            for n, of_control in self.gradient.items()
            if self.device.type == "cpu"
        }

    # Forwards ------------------------------------------------------------------------------------

    @torch.no_grad()
    def advance(
        self, i: int, states: Sequence[BlockState], gradients: Sequence[Tensor | None]
    ) -> list[BlockState]:
        """The states after step i; without θ if they are given without."""
        transformed = self._transform(i, gradients, self.values[i].get("noise", 0.0))
        result = []
        for block, state, g in zip(self.blocks, states, transformed, strict=True):
            if g is None:
                result.append(state)
                continue
            group, values = self.groups[block.group], self._group_values(i, block.group)
            theta, slots = self.differentiable.advance(
                group, values, g, state.parameters, state.optimizer, block.shapes
            )
            result.append(BlockState(theta, slots))
        return result

    def folds(self, i: int, gradients: Sequence[Tensor | None]) -> Iterator[tuple[int, Fold]]:
        """(index of a block that step i moved, how its state takes the gradient's memory)."""
        for b, (block, g) in enumerate(zip(self.blocks, gradients, strict=True)):
            if g is not None:
                values = self._group_values(i, block.group)
                fold = self.differentiable.fold(self.groups[block.group], values)
                assert fold is not None
                yield b, fold

    def _group_values(self, i: int, group: int) -> dict[str, Any]:
        return {
            name: self.plant.controls.group_value(name, group, value)
            for name, value in self.values[i].items()
            if name != "noise"
        }

    def _transform(
        self, i: int, gradients: Sequence[Tensor | None], sigma: float | Tensor
    ) -> list[Tensor | None]:
        """Clipping, by norm or by value, then ĝ = g + σ RMS(g) ξ per parameter tensor."""
        plant, result = self.plant, list(gradients)
        clip = plant.clip_value
        if clip is not None:
            result = [None if g is None else g.clamp(-clip, clip) for g in result]
        if plant.clip_norm is not None:
            present = [g for g in gradients if g is not None]
            norms = plant.parallel.norms(present)
            total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
            scale = (plant.clip_norm / (total + 1e-6)).clamp(max=1.0)
            result = [None if g is None else g * scale.to(g.device, g.dtype) for g in result]
        if not isinstance(sigma, Tensor) and sigma == 0:
            return result
        noise = plant.parallel.noise(plant.seed, self.trajectory.start + i)
        parts: list[Tensor | None] = [None] * len(noise)
        for block, g in zip(self.blocks, result, strict=True):
            if g is not None:
                for v, p in zip(block.views(g), block.indices, strict=True):
                    parts[p] = v
        rms = plant.parallel.root_mean_squares(parts)
        for b, (block, g) in enumerate(zip(self.blocks, result, strict=True)):
            if g is not None:
                scale = torch.cat(
                    [rms[p].to(g.dtype) * noise[p].reshape(-1) for p in block.indices]
                )
                result[b] = g + cast_like(sigma, g) * scale
        return result

    # Backwards -----------------------------------------------------------------------------------

    def vjp(
        self,
        i: int,
        before: Before,
        gradients: Sequence[Tensor | None],
        costate: Costate,
        evaluation: Evaluation,
    ) -> tuple[Costate, list[Tensor | None]]:
        """(λ_θ and λ_h before step i without the loss's part, λ_g); adds to dJ/du_i."""
        sigma = self.values[i].get("noise", 0.0)
        steered = "noise" in self.controls
        changed = steered or sigma != 0 or self._clips or bool(self.hooks)
        raw = transformed = list(gradients)
        if changed:
            with torch.enable_grad():
                noise = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
                raw = [None if g is None else g.detach().requires_grad_() for g in gradients]
                if self.hooks:  # they may read the parameter
                    evaluation.place(before.theta(), self.trajectory.buffers[i])
                    if i in self.checked:
                        self._check_hooks(raw)
                transformed = self._transform(
                    i, self._through_hooks(raw), noise if steered else sigma
                )
        parameters: list[Tensor | None] = []
        optimizer: list[list[Tensor | None]] = []
        of_gradients: list[Tensor | None] = []
        for b, g in enumerate(transformed):
            vjp = Vjp(costate.parameters[b], costate.optimizer[b], None, {})
            if g is not None:
                vjp = self._block_vjp(i, b, before, g.detach(), costate)
            parameters.append(vjp.parameters)
            optimizer.append(list(vjp.state))
            of_gradients.append(vjp.gradient)
        if changed:
            pairs = [
                (g, v)
                for g, v in zip(transformed, of_gradients, strict=True)
                if g is not None and v is not None and g.requires_grad
            ]
            leaves = [g for g in raw if g is not None]
            read = [self.plant.parameters[k] for k in self.hooks]
            of_gradients = [None for _ in raw]
            if pairs:
                found = list(
                    torch.autograd.grad(
                        [g for g, _ in pairs],
                        [*leaves, noise, *read],
                        [v for _, v in pairs],
                        allow_unused=True,
                    )
                )
                of_gradients = [None if g is None else found.pop(0) for g in raw]
                of_noise = found.pop(0)
                parameters = self._with_read(parameters, dict(zip(self.hooks, found, strict=True)))
                if steered and of_noise is not None:
                    self.gradient["noise"][i, 0].add_(of_noise)
        return Costate(parameters, optimizer, costate.statistics), of_gradients

    def _block_vjp(self, i: int, b: int, before: Before, g: Tensor, costate: Costate) -> Vjp:
        """The vjp of Φ for one block; adds to dJ/du_i."""
        block, state = self.blocks[b], before.states[b]
        vjp = self.differentiable.vjp(
            self.groups[block.group],
            self._group_values(i, block.group),
            g,
            state.parameters,
            state.optimizer,
            costate.parameters[b],
            costate.optimizer[b],
            [name for name in self.controls if name != "noise"],
            shapes=block.shapes,
        )
        for name, derivative in vjp.controls.items():
            # By the schedule's value, of which the group's is a function.
            slope = self.plant.controls.group_slope(name, block.group, self.values[i][name])
            if self.device.type == "cpu":
                self._numbers[name][i, block.group] += slope * float(derivative)
            else:
                self.gradient[name][i, block.group].add_(slope * derivative)
        return vjp

    # Hooks of parameters -------------------------------------------------------------------------

    def _through_hooks(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What hooks of parameters make of their gradients, in vectors per block."""
        result: list[Tensor | None] = []
        for block, g in zip(self.blocks, gradients, strict=True):
            if g is None or not any(k in self.hooks for k in block.indices):
                result.append(g)
                continue
            views = zip(block.indices, block.views(g), strict=True)
            parts = [through(self.hooks[k], v.clone()) if k in self.hooks else v for k, v in views]
            result.append(torch.cat([part.reshape(-1) for part in parts]))
        return result

    def _check_hooks(self, gradients: Sequence[Tensor | None]) -> None:
        """Raises Unseen where autograd misses what a hook does, as in no_grad or on `.data`:
        compares derivatives along g and along θ with central differences."""
        names = self.trajectory.hooks.names if self.trajectory.hooks is not None else ()
        for block, vector in zip(self.blocks, gradients, strict=True):
            views = [] if vector is None else block.views(vector.detach())
            for k, g in zip(block.indices, views, strict=bool(views)):
                if k in self.hooks and not _is_seen(self.hooks[k], g, self.plant.parameters[k]):
                    raise Unseen(
                        f"a hook of parameter {names[k]!r} changes its gradient where autograd "
                        "does not see it (torch.no_grad, .data, .detach()); write it in "
                        "differentiable operations, or do without hypergradients (rewrite=False)"
                    )

    def _with_read(
        self, parameters: Sequence[Tensor | None], found: Mapping[int, Tensor | None]
    ) -> list[Tensor | None]:
        result = list(parameters)
        for b, block in enumerate(self.blocks):
            own = [found.get(k) for k in block.indices]
            like = next((t for t in own if t is not None), None)
            if like is not None:
                pairs = zip(own, block.sizes, strict=True)
                parts = [like.new_zeros(n) if t is None else t.reshape(-1) for t, n in pairs]
                theta, read = result[b], torch.cat(parts)
                result[b] = read if theta is None else theta + read
        return result


def _is_seen(hooks: Sequence[Hook], g: Tensor, p: Tensor) -> bool:
    """Whether autograd's derivatives of what hooks make of g, along g and along p, are right."""
    leaf, data = g.clone().requires_grad_(), p.data

    def made(of_g: float, of_p: float) -> Tensor:
        with torch.no_grad():
            p.data = data * (1 + of_p)
            return through(hooks, g * (1 + of_g))

    try:
        along_g = (made(STRETCH, 0) - made(-STRETCH, 0)) / (2 * STRETCH)
        along_p = (made(0, STRETCH) - made(0, -STRETCH)) / (2 * STRETCH)
    finally:
        p.data = data
    found = through(hooks, leaf.clone())
    for seed, slope in ((g, along_g), (along_g, along_g), (along_p, along_p)):
        vjps: Sequence[Tensor | None] = (None, None)
        if found.requires_grad:
            vjps = torch.autograd.grad(found, (leaf, p), seed, allow_unused=True, retain_graph=True)
        of, point = (vjps[1], data) if slope is along_p else (vjps[0], g)
        expected = float((seed * slope).sum())
        by_autograd = 0.0 if of is None else float((of * point).sum())
        size = float(seed.norm() * max(seed.norm(), slope.norm()))
        if math.isfinite(size) and not abs(by_autograd - expected) <= SAME_SLOPE * size:
            return False
    return True
