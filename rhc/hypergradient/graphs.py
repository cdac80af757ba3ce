"""The graphs of the steps' gradients that a roll keeps for the reverse pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from rhc.containers import tensors_of
from rhc.data_weights import leaves_of
from rhc.hypergradient import kernels
from rhc.hypergradient.evaluation import (
    Evaluation,
    Places,
    double_backward,
    graph_nodes,
    is_recurrent,
    visible_statistics,
)
from rhc.hypergradient.hvp import KeptGraph
from rhc.rng import preserved
from rhc.training.module_state import filled
from rhc.training.plant import Plant
from rhc.training.recorder import moved_by_loss


class Survey(NamedTuple):
    """What a plant's graphs hold."""

    size: int  # bytes
    read: frozenset[str]  # parameters whose values they read, so that leaves must be copies
    steady: bool  # whether a graph outlives its step


_SURVEYS: WeakKeyDictionary[Plant, Survey] = WeakKeyDictionary()


class Made(NamedTuple):
    """A graph, the gradients' values, and the step's effect on buffers."""

    graph: KeptGraph
    gradients: Sequence[Tensor | None]
    buffers: list[tuple[dict[str, Any], str, Tensor | None, Tensor | None]]
    steady: bool  # False with activation checkpointing, which reruns the model in the backward pass

    @torch.no_grad()
    def write_buffers(self) -> None:
        """Moves the live buffers as the step would have."""
        for own, name, live, after in self.buffers:
            own[name] = after if live is None or after is None else filled(live, after)


class TooMuch(Exception):
    """A graph exceeds the size worth measuring."""


class GraphMaker:
    """Makes graphs of a plant's gradient at its live values, which stay valid when these change.

    Leaves stand for parameters: copies where the graph reads their values, else in the live memory
    with its version counter, so that autograd raises an error if the graph reads it after all.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.blocks = evaluation.blocks
        plant = evaluation.plant
        model = plant.model
        indices = [i for block in self.blocks for i in block.indices]
        self._parameters = [plant.parameters[i] for i in indices]
        self._names = [name for block in self.blocks for name in block.names]
        self._places = Places(model, self._parameters)
        self._recurrent = is_recurrent(model)
        self._buffers: list[tuple[str, dict[str, Any]]] = [
            (f"{prefix}." if prefix else "", module._buffers)
            for prefix, module in model.named_modules()
        ]

    def __call__(self, batch: Any, *, inside: bool = False) -> Made:
        """The graph and a copy of the gradients. inside: `double_backward` is already active."""
        read = self.survey(batch).read
        leaves = [
            (p.detach().clone() if name in read else p.detach()).requires_grad_()
            for name, p in zip(self._names, self._parameters, strict=True)
        ]
        made = self._graph(batch, leaves, inside)
        return made._replace(gradients=_separate(made.gradients))

    def survey(self, batch: Any, enough: float = math.inf) -> Survey:
        """Surveys a graph made once and dropped; raises TooMuch beyond `enough` bytes."""
        plant = self.evaluation.plant
        if plant not in _SURVEYS:
            with torch.enable_grad(), preserved(), plant.untouched():
                _SURVEYS[plant] = self._survey(batch, enough)
        return _SURVEYS[plant]

    def _survey(self, batch: Any, enough: float) -> Survey:
        plant = self.evaluation.plant
        leaves = [p.detach().clone().requires_grad_() for p in self._parameters]
        place = {
            leaf.untyped_storage().data_ptr(): name
            for name, leaf in zip(self._names, leaves, strict=True)
        }
        held = [*plant.parameters, *plant.model.buffers(), *tensors_of(batch)]
        own = {t.untyped_storage().data_ptr() for t in held if t.layout == torch.strided}
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.layout != torch.strided:  # has no storage; the recorder will refuse it by name
                return t
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
                if sum(seen.values()) > enough:
                    raise TooMuch
            return t.detach()  # the tensor itself could hold the node that holds it

        try:
            with saved_tensors_hooks(pack, lambda t: t):
                _, found, _, steady = self._graph(batch, leaves)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):  # torch.func has none
                raise
            return Survey(0, frozenset(self._names), False)
        read = frozenset(name for pointer, name in place.items() if pointer in seen)
        size = sum(seen.values())
        for node in graph_nodes([g for g in found if g is not None]):
            function = getattr(type(node), "_forward_cls", None)
            if function is not None and not function.__module__.startswith(kernels.__name__):
                # It may keep tensors where nobody sees them.
                copies = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
                return Survey(size + copies, frozenset(self._names), steady)
        return Survey(size, read, steady)

    def _graph(self, batch: Any, leaves: list[Tensor], inside: bool = False) -> Made:
        """As `__call__` at these leaves; the gradients still have their graph."""
        evaluation = self.evaluation
        model = evaluation.plant.model
        names = set(evaluation.statistics_names)
        statistics: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}
        buffers = [
            (own, name, prefix + name, live)
            for prefix, own in self._buffers
            if own
            for name, live in own.items()
        ]
        for _, _, full, live in buffers:
            if live is not None and id(live) not in copies:
                copies[id(live)] = live.detach().clone()
                if full in names:
                    statistics[full] = copies[id(live)].requires_grad_()
        visible = visible_statistics(model, update=True) if names else nullcontext()
        twice = double_backward(model, valued=True, recurrent=self._recurrent)
        versions = [leaf._version for leaf in leaves]
        with nullcontext() if inside else twice, visible, _checkpointing() as used:
            try:
                self._places.put(leaves)
                for owner, name, _, live in buffers:
                    if live is not None:
                        owner[name] = copies[id(live)]
                evaluated = evaluation(
                    batch, statistics=bool(names), twice=True, stage=evaluation.joint(names)
                )
                for name, leaf, version in zip(self._names, leaves, versions, strict=True):
                    if leaf._version != version:
                        raise moved_by_loss(name)
                weights = leaves_of(batch)
                found = torch.autograd.grad(
                    evaluated.loss, [*leaves, *weights], create_graph=True, allow_unused=True
                )
                found, by_weight = found[: len(leaves)], found[len(leaves) :]
                for w, g in zip(weights, by_weight, strict=True):
                    w.grad = None if g is None else g.detach()
                after = [
                    (owner, name, live, None if new is None else new.detach())
                    for owner, name, _, live in buffers
                    for new in (owner.get(name),)
                ]
            finally:
                self._places.put(self._parameters)
                for owner, name, _, live in buffers:
                    owner[name] = live
        edges = [None if g is None or not g.requires_grad else _edge(g) for g in found]
        return Made(KeptGraph(leaves, statistics, edges, evaluated), found, after, not used)


def _separate(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Their values in separate memory, because noise and clipping change them in place: autograd
    gives the two biases of a recurrent layer one tensor."""
    seen: set[int] = set()
    found: list[Tensor | None] = []
    for g in gradients:
        value = None if g is None else g.detach()
        if value is not None and value.layout == torch.strided and value.numel():
            place = value.data_ptr()
            value = value.clone() if place in seen else value
            seen.add(place)
        found.append(value)
    return found


def _edge(g: Tensor) -> GradientEdge:
    """Where the graph of g begins; C++ nodes need none of get_gradient_edge's care."""
    node: Any = g.grad_fn
    if node is None or isinstance(node, torch._C._FunctionBase):
        return get_gradient_edge(g)
    return GradientEdge(node, g.output_nr)


@contextmanager
def _checkpointing() -> Iterator[list[bool]]:
    module: Any = torch.utils.checkpoint
    name = "_checkpoint_without_reentrant_generator"
    used: list[bool] = []
    original = getattr(module, name, None)
    if original is None:
        yield used
        return

    def noticed(*args: Any, **kwargs: Any) -> Any:
        used.append(True)
        return original(*args, **kwargs)

    setattr(module, name, noticed)
    try:
        yield used
    finally:
        setattr(module, name, original)
