"""Reads and writes the controls of a torch.optim optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rhc.errors import InputError
from rhc.schedule.controls import CONTROLS, Scalar


class OptimizerControls:
    """The controls of an optimizer, per parameter group.

    A schedule with one value for a control sets the *reference* group, the first with a nonzero
    value; the others keep their initial ratio to it in the unconstrained coordinate, and 0 stays 0.
    A schedule with a value per group sets each. Groups added later keep their ratio at that time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._parted: set[str] = set()
        groups = optimizer.param_groups
        self.available = tuple(
            name for name in CONTROLS if name == "noise" or _read(groups[0], name) is not None
        )
        self.adopt({n: [float(_read(g, n) or 0.0) for g in groups] for n in self.available})

    def adopt(self, own: Mapping[str, list[float]]) -> None:
        """Sets the initial values, control -> one per group, that define the ratios."""
        self.own = {name: list(values) for name, values in own.items()}
        self.initial: dict[str, float] = {}
        self.ratios: dict[str, list[float]] = {}
        for name, values in own.items():
            reference = next((v for v in values if v != 0), 0.0)
            self.initial[name] = reference
            self.ratios[name] = [
                1.0 if reference == 0 else CONTROLS[name].ratio(v, reference) for v in values
            ]

    def take_up(self) -> None:
        """Adopts parameter groups that were added."""
        groups = self.optimizer.param_groups
        for name, own in self.own.items():
            if len(own) >= len(groups):
                return
            lead = next((i for i, value in enumerate(own) if value != 0), None)
            now = 0.0 if lead is None else float(_read(groups[lead], name) or 0.0)
            initial, known = self.initial[name], CONTROLS[name]
            for group in groups[len(own) :]:
                value = float(_read(group, name) or 0.0)
                reference = now or initial
                ratio = known.ratio(value, reference) if reference else 1.0
                own.append(float(known.rescale(initial, ratio)) if now else value)
                self.ratios[name].append(ratio)

    def part(self, names: Iterable[str]) -> None:
        """Gives groups tensors of their own: `Adam(groups, lr=torch.tensor(0.1))` shares one."""
        for name in names:
            seen: set[int] = set()
            for group in self.optimizer.param_groups:
                value = group.get(name)
                if isinstance(value, Tensor):
                    if value.data_ptr() in seen:
                        group[name] = value.clone()
                    seen.add(value.data_ptr())
            self._parted.add(name)

    def check_groups(self, groups: int | None) -> None:
        """Raises InputError where a schedule has values for another number of groups."""
        have = len(self.optimizer.param_groups)
        if groups not in (None, have):
            raise InputError(
                f"the schedule has values for {groups} parameter groups, the optimizer "
                f"has {have}; use it with the groups that it was made for"
            )

    def group_value(self, name: str, group: int, value: Scalar | tuple[float, ...]) -> Scalar:
        """The value of a parameter group for the schedule's `value`: a number, or a tuple or tensor
        (G,). A group at 0 of a tensor gets the float 0, so that it needs no momentum buffer."""
        if isinstance(value, (tuple, list)):
            if group >= len(value):  # it was added later
                self.check_groups(len(value))
            return value[group]
        if isinstance(value, Tensor) and value.dim() == 1:
            return value[group] if float(value[group].detach()) else 0.0
        if not isinstance(value, Tensor) and value == self.initial[name]:
            return self.own[name][group]  # bit-identical, unlike through a ratio
        return CONTROLS[name].rescale(value, self.ratios[name][group])

    def group_slope(self, name: str, group: int, value: float | Sequence[float]) -> float:
        """d(the group's value) / d(the schedule's value); 1 where every group has its own."""
        if isinstance(value, Sequence):
            return 1.0
        ratio = self.ratios[name][group]
        if CONTROLS[name].coordinate == "log":
            return ratio
        return ratio / (1 - value + value * ratio) ** 2

    def write(self, values: Mapping[str, float | tuple[float, ...]]) -> None:
        """Sets the controls except noise. values: as of `Schedule.at`."""
        self.take_up()
        self.part(n for n, v in values.items() if type(v) is tuple and n not in self._parted)
        for index, group in enumerate(self.optimizer.param_groups):
            for name, value in values.items():
                if name != "noise":
                    _write(group, name, self.group_value(name, index, value))


def _read(group: Mapping[str, Any], name: str) -> float | None:
    if name == "momentum" and "betas" in group:
        return float(group["betas"][0])
    return None if name not in group else float(group[name])


def _write(group: dict[str, Any], name: str, value: Scalar) -> None:
    if name == "momentum" and "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    elif isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters in the order of the groups, which is that of the noise."""
    return [p for group in optimizer.param_groups for p in group["params"]]
