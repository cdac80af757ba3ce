"""Verifies a hypergradient by central differences of rolls of the plain loop.

⟨dJ/du, d⟩ = (J(u + εd) − J(u − εd)) / 2ε + O(ε²) for a direction d in the controls' coordinates.
Near the edge of stability, J of a whole window is no smooth function of u in float32. So it is cut
after k ≤ 4 steps: J_k = Σ_{t<k} stage_t + ⟨λ_k, s_k⟩, whose derivatives by the first k steps'
controls are those of J; this costs 2k plain steps a control. The terminal loss, which is in J_k by
its gradient alone, and the hvp (`product_check`) are tested separately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rhc.data_weights import DATA_WEIGHTS, Weighed, factors_of
from rhc.hypergradient.adjoint import Cut, Terminal
from rhc.hypergradient.differences import noting_precision, precision, precision_known
from rhc.hypergradient.evaluation import modes_kept, parts
from rhc.hypergradient.hvp import Product, per_parameter
from rhc.hypergradient.optimizer_step import Costate
from rhc.hypergradient.product_check import double, doubled, in_double, try_product
from rhc.hypergradient.states import float_tensors
from rhc.rng import preserved
from rhc.schedule import CONTROLS
from rhc.training.losses import checked_loss
from rhc.training.objective import Objective
from rhc.training.plant import Plant
from rhc.training.snapshot import Snapshot
from rhc.training.trajectory import Trajectory

MOST_STEPS = 4
"""Steps that are rolled to either side."""

_COARSE = 1e-4
"""A machine epsilon above this is reduced precision (bfloat16, float16)."""

_AT_ZERO = {"noise": 0.1, "weight_decay": 0.01}
"""How far a control of 0, whose coordinate is a logarithm, is moved by a step of 1."""


@dataclass(frozen=True)
class Disagreements:
    """Relative disagreements of a hypergradient with the plain loop, beyond rounding."""

    of: dict[str, float]  # control -> |difference − predicted| / the larger of both
    terminal: float = 0.0  # of the terminal loss with its gradient
    hessian: float = 0.0  # of the product with differences of gradients
    of_what: str = ""  # the custom Function that it was tried with, if any
    not_the_step: str = ""  # in words, how the rolled step differs from the plain loop's
    tolerance: float = 0.05
    cost: float = 0.0  # gradient evaluations, without terminals
    terminals: int = 0  # terminal losses evaluated

    @property
    def _all(self) -> dict[str, float]:
        found = {f"dJ/d({name})": apart for name, apart in self.of.items()}
        product = "the Hessian product" + (f" of {self.of_what}" if self.of_what else "")
        return found | {"the terminal loss's gradient": self.terminal, product: self.hessian}

    @property
    def finite(self) -> bool:
        return all(math.isfinite(apart) for apart in self._all.values())

    @property
    def holds(self) -> bool:
        """Whether the hypergradient agrees with the plain loop."""
        return not self.not_the_step and all(x <= self.tolerance for x in self._all.values())

    @property
    def of_the_product(self) -> bool:
        """Whether another product might hold."""
        return not self.not_the_step and self.terminal <= self.tolerance

    def sentence(self) -> str:
        """What was found, and the usual causes."""
        if self.not_the_step:
            return (
                f"{self.not_the_step}: look for hooks that change gradients or weights, and for "
                "state or randomness that loss_fn keeps outside the model"
            )
        worst = max(self._all, key=lambda name: self._all[name])
        return (
            f"{worst} is off by {self._all[worst]:.2g} of what the plain loop shows a step to "
            "either side: look for detached values, no_grad and gradient reversal inside the loss, "
            "custom backwards, hooks, and state that the model or loss_fn moves outside the "
            "optimizer"
        )


def hooks(plant: Plant) -> tuple[int, ...]:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return (
        *(len(getattr(m, kind)) for m in plant.model.modules() for kind in kinds),
        *(len(p._backward_hooks or ()) for p in plant.owned),
        *(len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in plant.owned),
        len(plant.optimizer._optimizer_step_pre_hooks),
        len(plant.optimizer._optimizer_step_post_hooks),
    )


def steps_to_cut(
    steps: int, controls: Sequence[str], product: Product, *, few: bool, damped: bool
) -> int:
    """k for a window of `steps`: 1 with product "none" or damping, at most 2 if `few`."""
    if product == "none" or damped:
        return 1
    return min(steps, 2 if few else max(2, MOST_STEPS // max(len(controls), 1)))


def verify(
    plant: Plant,
    beginning: Snapshot,
    trajectory: Trajectory,
    objective: Objective,
    gradient: Mapping[str, Tensor],
    cut: Cut,
    product: Product,
    terminal: Terminal | None,
    value: float,
    at: Sequence[Tensor] | None,
    *,
    hessian: bool,
    rows: Sequence[Sequence[Tensor]] = (),
) -> Disagreements:
    """Compares a reverse pass with the plain loop; the live state is restored.

    gradient: control -> (K,) or (K, G). value: the terminal loss. at: its θ̄ in the optimizer's
    parameter order; None for the live last iterate. hessian: tries the product in float64. rows:
    per step the derivatives by the weights of its rows.
    """
    own = max(torch.finfo(p.dtype).eps for p in plant.parameters if p.is_floating_point())
    rolls = _Rolls(plant, beginning, trajectory, objective, cut, own)
    tolerance, shares = 0.05, (1e-2, 1e-3)
    if is_double(plant):
        exact = product in ("exact", "none")
        tolerance, shares = 1e-6 if exact else 1e-5, (1e-4, 1e-6)
    of: dict[str, float] = {}
    of_terminal, of_hessian, terminals = 0.0, 0.0, 0
    eps, end = own, plant.snapshot()
    try:
        if terminal is not None and not plant.parallel.sharded:
            of_terminal, terminals = _of_terminal(
                plant,
                trajectory,
                objective,
                terminal,
                value,
                at,
                cut.terminal,
                shares,
                own,
                tolerance,
                end,
            )
        if not precision_known(plant):
            plant.restore(beginning)
            with noting_precision(plant):
                plant.loss(parts(trajectory.batches[0])[0])
        rolls.loss_eps = max(own, precision(plant))
        eps = max(rolls.loss_eps, plant.differentiable.precision)
        if eps > _COARSE:
            tolerance = 0.2
        for name, g in gradient.items():
            of[name] = _of_control(rolls, name, g[: cut.k], eps, tolerance)
        if plant.data_weights is not None:
            by_cell = rolls.by_cell(rows[: cut.k])
            of[DATA_WEIGHTS] = _of_control(rolls, DATA_WEIGHTS, by_cell, eps, tolerance)
        if hessian and product != "none" and own > 1e-10 and eps < _COARSE:
            batch = trajectory.batches[min(cut.k, len(trajectory) - 1)]
            of_hessian, cost = try_product(
                plant, product, trajectory.blocks, batch, cut.costate, before=end
            )
            rolls.cost += cost
    finally:
        plant.restore(end)
        plant.optimizer.zero_grad()
    if plant.ranks is not None:  # one verdict for all
        of, of_terminal = plant.ranks.share([of, of_terminal])
    strange = "" if eps > _COARSE else rolls.not_the_step
    return Disagreements(of, of_terminal, of_hessian, "", strange, tolerance, rolls.cost, terminals)


def is_double(plant: Plant) -> bool:
    return all(p.dtype == torch.float64 for p in plant.parameters if p.is_floating_point())


def _of_control(rolls: _Rolls, name: str, gradient: Tensor, eps: float, tolerance: float) -> float:
    """The disagreement of one control, at the first conclusive distance."""
    values = rolls.values(name)
    slope, move = _coordinate(name, values)
    raw = (gradient * slope).double()
    if not bool(raw.isfinite().all()):
        return math.nan
    # Where the derivative vanishes there is still a direction in which J should not change.
    direction = raw / raw.abs().max() if bool((raw != 0).any()) else (slope != 0).double()
    if not bool((direction != 0).any()):
        return 0.0

    def apart(distance: float, along: Tensor = direction, finer: float = 1.0) -> _Difference:
        plus, rounding = rolls.value({name: move(distance * along)})
        minus, _ = rolls.value({name: move(-distance * along)})
        noise = 4 * finer * rounding / (2 * distance)
        return _Difference((plus - minus) / (2 * distance), float((raw * along).sum()), noise)

    double = eps < 1e-10
    distance = 1e-4 if double else 0.02 if eps < _COARSE else 0.2
    first = apart(distance)
    if first.says(tolerance):
        return first.apart
    if name != "noise" and not double and eps < _COARSE and rolls.in_double_too:
        # Kinks lie within the distance, or rounding dominates: neither is so in float64.
        try:
            with rolls.in_double():
                close = apart(1e-5, finer=1e-6)
                if close.says(tolerance) or close.agrees(apart(1e-4, finer=1e-6)):
                    return close.apart
        except Exception:  # code that is bound to float32
            pass
    # The distance with the fewest kinks: where rounding makes up a hundredth.
    share = 100 * first.noise / max(abs(first.value), abs(first.predicted), 1e-300)
    second = apart(distance * (max(share, 0.01) if share < 0.25 else 5.0))
    if second.says(tolerance) or second.agrees(first):
        return second.apart
    # J is not smooth here. In the last step's controls it always is, but for rounding.
    last = rolls.last(name) * (slope != 0).double()
    third = apart(distance, last)
    if third.says(tolerance) or third.agrees(apart(10 * distance, last)):
        return third.apart
    return 0.0 if rolls.repeat() else 1.0


@dataclass(frozen=True)
class _Difference:
    """(J(u + εd) − J(u − εd)) / 2ε, its prediction, and its rounding error."""

    value: float
    predicted: float
    noise: float

    @property
    def apart(self) -> float:
        """The relative disagreement beyond rounding; NaN where J is not finite."""
        return _apart(self.value, self.predicted, self.noise)

    def says(self, tolerance: float) -> bool:
        """Whether it is not finite, or agrees and exceeds rounding."""
        seen = self.predicted == 0 or self.noise <= max(abs(self.value), abs(self.predicted))
        return not math.isfinite(self.value) or (seen and self.apart <= tolerance)

    def agrees(self, other: _Difference) -> bool:
        """Whether two distances give the same difference, unlike the prediction."""
        closer = abs(self.value - other.value) <= 0.05 * abs(self.value - self.predicted)
        return not math.isfinite(other.value) or closer


def _apart(difference: float, predicted: float, noise: float) -> float:
    if not math.isfinite(difference):
        return math.nan
    scale = max(abs(difference), abs(predicted), noise, 1e-300)
    return max(0.0, abs(difference - predicted) - noise) / scale


def _coordinate(name: str, values: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(du/dx, x ↦ u at a distance x in the control's own coordinate)."""
    if name != DATA_WEIGHTS and CONTROLS[name].coordinate == "logit":
        return values * (1 - values), lambda x: torch.where(
            values > 0, (values.logit() + x).sigmoid(), values
        )
    zero = _AT_ZERO.get(name, 0.0)
    slope = torch.where(values > 0, values, zero)
    return slope, lambda x: torch.where(values > 0, values * x.exp(), zero * x)


class _Rolls:
    """Rolls of the plain loop over the first k steps, from the window's beginning."""

    def __init__(
        self,
        plant: Plant,
        beginning: Snapshot,
        trajectory: Trajectory,
        objective: Objective,
        cut: Cut,
        eps: float,
    ) -> None:
        self.plant, self.beginning, self.trajectory = plant, beginning, trajectory
        self.objective, self.cut = objective, cut
        self.batches = trajectory.batches[: cut.k]
        self.eps = self.loss_eps = eps
        self.cost = self.size = 0.0
        """Gradient evaluations so far; |λ ∘ s|, the scale of rounding."""
        self._doubles: dict[int, Tensor] = {}
        self.not_the_step = ""
        if plant.data_weights is not None:
            own = sorted({c for batch in self.batches for c in _cells_of(batch)})
            every = [own] if plant.ranks is None else plant.ranks.gather_json(own)
            self._cells = torch.tensor(sorted({c for cells in every for c in cells}))
            """Those that the first k steps weigh."""

    @property
    def in_double_too(self) -> bool:
        """Whether the steps can be repeated in float64: no draws, no hooks, one process."""
        at = [self.trajectory.schedule.at(self.trajectory.start + i) for i in range(self.cut.k)]
        draws = any(rng is not None for rng in self.trajectory.rng[: self.cut.k])
        noisy = any(values.get("noise", 0.0) for values in at)
        return self.plant.ranks is None and not draws and not noisy and not any(hooks(self.plant))

    @contextmanager
    def in_double(self) -> Iterator[None]:
        """Inside, rolls are taken in float64, at twice the cost."""
        state, own = self.plant.optimizer.state, self.batches
        slots = [(p, state[p], dict(state[p])) for p in self.plant.owned if p in state]
        cost = self.cost
        try:
            with in_double(self.plant.model):
                self.batches = [doubled(batch) for batch in own]
                for _, live, values in slots:
                    live.update({n: double(v) for n, v in values.items() if n != "step"})
                yield
        finally:
            self.batches, self.cost = own, 2 * self.cost - cost
            for p, live, values in slots:
                live.clear()
                live.update(values)
                state[p] = live

    def values(self, name: str) -> Tensor:
        if name == DATA_WEIGHTS:
            assert self.plant.data_weights is not None
            return self.plant.data_weights.at(self._cells)
        return self.trajectory.schedule[name][: self.cut.k].double()

    def value(self, moved: Mapping[str, Tensor]) -> tuple[float, float]:
        """(J_k with some controls moved, its rounding error)."""
        plant, trajectory, cut = self.plant, self.trajectory, self.cut
        plant.restore(self.beginning)
        columns = {name: v.tolist() for name, v in moved.items() if name != DATA_WEIGHTS}
        batches = self.batches
        if DATA_WEIGHTS in moved:
            relative = moved[DATA_WEIGHTS] / self.values(DATA_WEIGHTS)
            factors = factors_of(self._cells, relative)
            numbered = enumerate(batches, trajectory.start)
            batches = [plant.weighed_by(batch, step, factors) for step, batch in numbered]
        total, sizes = 0.0, 0.0
        for i in range(cut.k):
            step = trajectory.start + i
            values = {**trajectory.schedule.at(step)}
            values |= {
                n: tuple(c[i]) if isinstance(c[i], list) else c[i] for n, c in columns.items()
            }
            observed = plant.step(batches[i], values, step)
            self.cost += 1
            if i == 0 and DATA_WEIGHTS not in moved:
                self._compare(float(observed.loss), float(observed.gradient_norm))
            stage = self.objective.stage(observed.loss.double(), observed.metrics)
            if stage is not None:
                total += float(stage)
                sizes += abs(float(stage))
            if i + 1 < cut.k and cut.weights[i]:
                total += cut.weights[i] * self._dot(cut.terminal)
        total += self._dot(cut.costate.parameters, cut.costate)
        return total, self.loss_eps * sizes + self.eps * self.size

    def by_cell(self, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """(m,) the sums by cell of the first k steps' derivatives by row, over all ranks."""
        total = torch.zeros(len(self._cells), dtype=torch.float64)
        for batch, of_step in zip(self.batches, rows, strict=True):
            for cells, of_rows in zip(_each_cells(batch), of_step, strict=True):
                total.index_add_(0, torch.searchsorted(self._cells, cells), of_rows)
        return torch.tensor(self.plant.parallel.sums(total.tolist()), dtype=torch.float64)

    def last(self, name: str) -> Tensor:
        """1 for the last step's control, or the cells that it alone weighs."""
        if name != DATA_WEIGHTS:
            only = torch.zeros_like(self.values(name))
            only[-1] = 1
            return only
        before = torch.tensor([c for b in self.batches[:-1] for c in _cells_of(b)])
        return (~torch.isin(self._cells, before)).double()

    def repeat(self) -> bool:
        """Whether a repeated roll gives the same value, so that differences are not noise."""
        return self.value({}) == self.value({})

    def _compare(self, loss: float, norm: float) -> None:
        """Compares the first step's loss and gradient norm, which no control affects."""
        trajectory = self.trajectory
        for what, now, then in (
            ("loss", loss, float(trajectory.losses[0])),
            ("gradient's norm", norm, float(trajectory.gradient_norms[0])),
        ):
            apart = abs(now - then) / max(abs(now), abs(then), 1e-30)
            if apart > 1e-3:
                self.not_the_step = (
                    f"the {what} of step {trajectory.start} was {then:.6g} where the plain loop "
                    f"has {now:.6g}"
                )

    def _dot(self, vectors: Sequence[Tensor | None], costate: Costate | None = None) -> float:
        """⟨λ, s⟩ of the live state; of the parameters alone without a costate."""
        states = self.plant.block_states(self.trajectory.blocks)
        pairs: list[tuple[Tensor, Tensor | None]] = []
        for b, (state, of_theta) in enumerate(zip(states, vectors, strict=True)):
            theta, *slots = float_tensors(state)
            pairs.append((theta, of_theta))
            if costate is not None:
                # [] where nothing depends on the optimizer's state.
                pairs += zip(slots, costate.optimizer[b], strict=False)
        if costate is not None:
            pairs += [(self.plant.model.get_buffer(n), v) for n, v in costate.statistics.items()]
        known = [(t.double().reshape(-1), self._double(v)) for t, v in pairs if v is not None]
        total = sum(float(t @ v) for t, v in known)
        if costate is not None and not self.size:
            self.size = math.sqrt(sum(float((t * v).square().sum()) for t, v in known))
        return float(self.plant.parallel.sum_of_parts(torch.tensor(total, dtype=torch.float64)))

    def _double(self, vector: Tensor) -> Tensor:
        if id(vector) not in self._doubles:
            self._doubles[id(vector)] = vector.double().reshape(-1)
        return self._doubles[id(vector)]


def _each_cells(batch: Any) -> list[Tensor]:
    return [part.cells for part in parts(batch) if isinstance(part, Weighed)]


def _cells_of(batch: Any) -> list[int]:
    return [c for cells in _each_cells(batch) for c in cells.tolist()]


# The terminal loss --------------------------------------------------------------------------------


def _of_terminal(
    plant: Plant,
    trajectory: Trajectory,
    objective: Objective,
    terminal: Terminal,
    value: float,
    at: Sequence[Tensor] | None,
    gradient: Sequence[Tensor | None],
    shares: Sequence[float],
    eps: float,
    tolerance: float,
    end: Snapshot,
) -> tuple[float, int]:
    """(The disagreement of the terminal loss with its gradient, along it; losses taken). shares: of
    the loss's value, by which the distances should change it."""
    square = float(plant.parallel.norm([g for g in gradient if g is not None])) ** 2
    level = abs(objective.terminal_weight * value)
    if not square > 0 or not level > 0 or not math.isfinite(square * level):
        return 0.0, 0
    indices = [i for block in trajectory.blocks for i in block.indices]
    live = [plant.parameters[i] for i in indices]
    mean = [(plant.parameters if at is None else at)[i].detach().clone() for i in indices]
    along = per_parameter(trajectory.blocks, gradient)
    least, taken = math.inf, 0
    for share in shares:
        distance = share * level / square
        sides = []
        for sign in (distance, -distance):
            plant.restore(end)
            with torch.no_grad():
                for p, m, v in zip(live, mean, along, strict=True):
                    p.copy_(m if v is None else m + sign * v.to(m.dtype))
            sides.append(objective.terminal_weight * _taken(plant, terminal))
            taken += 1
        difference = (sides[0] - sides[1]) / (2 * distance)
        least = min(least, _apart(difference, square, 4 * eps * level / (2 * distance)))
        if least <= tolerance:
            break
    return least, taken


def _taken(plant: Plant, terminal: Terminal) -> float:
    """terminal(model) of the live model, whose modes and random state are restored."""
    with preserved(), modes_kept(plant.model):
        return plant.value(checked_loss(terminal(plant.model), "terminal")[0].detach())
