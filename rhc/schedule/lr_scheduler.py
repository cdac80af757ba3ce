"""ScheduleReplay: a schedule as a torch.optim.lr_scheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from rhc.rng import add_gradient_noise
from rhc.schedule import OptimizerControls, Schedule, parameters_of
from rhc.schedule.steering import BeforeSteps


class ScheduleReplay(BeforeSteps, LRScheduler):
    """Replays lr, momentum, weight decay and noise of a schedule; see Schedule.to_lr_scheduler."""

    optimizer: torch.optim.Optimizer

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: Schedule, last_epoch: int = -1
    ) -> None:
        self.schedule = schedule
        self.controls = OptimizerControls(optimizer)
        self.controls.check_groups(schedule.groups)
        self.controls.part(n for n, v in schedule.values.items() if v.dim() == 2)
        self.optimizer = optimizer
        if "noise" in schedule and bool((schedule["noise"] != 0).any()):
            self.hook("_add_noise")
        LRScheduler.__init__(self, optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The lr of every group. Also writes the other controls, since LRScheduler.step() calls
        this once per step and writes lr alone."""
        self.steers()
        self._noise_is_due = True
        self.controls.take_up()
        values = self._current()
        written = {n: v for n, v in values.items() if n in self.controls.available and n != "lr"}
        self.controls.write(written)
        if "lr" not in values:
            return [group["lr"] for group in self.optimizer.param_groups]
        return [
            self.controls.group_value("lr", index, values["lr"])
            for index in range(len(self.optimizer.param_groups))
        ]

    def state_dict(self) -> dict[str, Any]:
        """The position and last values, without the schedule."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": self._last_lr,
            "base_lrs": self.base_lrs,
            "own": {name: list(values) for name, values in self.controls.own.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from `state_dict` and writes the controls of that step."""
        state = dict(state_dict)
        own = state.pop("own")
        known = self.controls.own  # the state may be from before a group was added
        self.controls.adopt(
            {n: [*values, *known.get(n, [])[len(values) :]] for n, values in own.items()}
        )
        super().load_state_dict(state)
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _current(self) -> dict[str, Any]:
        return self.schedule.at(self.schedule.start + self.last_epoch)

    def _add_noise(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Once per step(): while SequentialLR steps another scheduler, this one must not repeat it.
        if not (self._noise_is_due and self.is_steering and self.last_epoch >= 0):
            return
        self._noise_is_due = False
        sigma = self._current()["noise"]
        step = self.schedule.start + self.last_epoch
        add_gradient_noise(parameters_of(optimizer), sigma, self.schedule.seed, step)
