"""Sampling by what each example still has to teach, with weights that keep the loss unbiased.

`ExampleStatistics` keeps 8 bytes per example, `LossSampler` 4 more and 4 during a pass: 10⁷
examples take 160 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from rhc.errors import InputError, whole_number

_CHUNK = 1 << 18
_HALF = float(np.finfo(np.float16).max)


class ExampleStatistics:
    """Of every example: a recent and an older loss, a gradient norm, and how often it was seen.

    recent: exponential average with weight ½; older: with weight ⅛; their difference says whether
    the example is being learned. All vectorised, in place, bounded: 8 bytes per example (losses and
    norms in half precision, which is good to a thousandth; counts stop at 255).
    """

    def __init__(self, examples: int) -> None:
        if examples < 1:
            raise InputError(f"examples must be ≥ 1, got {examples}")
        if examples >= 2**31:
            raise InputError(f"examples must be < 2³¹, got {examples}; sample shards instead")
        self.recent = np.zeros(examples, np.float16)
        self.older = np.zeros(examples, np.float16)
        self.norm = np.zeros(examples, np.float16)
        self.count = np.zeros(examples, np.uint8)
        self.norms = np.zeros(examples, np.uint8)
        self.unit: float | None = None

    def __len__(self) -> int:
        return len(self.recent)

    def observe(self, indices: Any, losses: Any, norms: Any = None) -> None:
        """Takes in losses (B,) of the examples `indices` (B,), and norms of their gradients.

        What is not finite, or negative, is left out. An example that comes twice counts once, with
        its last value.
        """
        at = _array(indices, np.int64)
        values = _array(losses, np.float64)
        if at.shape != values.shape or at.ndim != 1:
            raise InputError(
                f"indices and losses must be of one length, got shapes {at.shape} and "
                f"{values.shape}; give one loss per example"
            )
        if len(at) and not (at.min() >= 0 and at.max() < len(self)):
            raise InputError(
                f"indices must be in [0, {len(self)}), got {at.min()} to {at.max()}; build the "
                "statistics for the whole dataset"
            )
        good = np.isfinite(values) & (values >= 0)
        if self.unit is None and good.any():
            # Half precision has its own range: losses are kept in units of the first ones' mean.
            mean = float(values[good].mean())
            self.unit = mean if mean > 0 else 1.0
        with np.errstate(over="ignore"):  # a unit near the smallest number there is
            scaled = np.minimum(values / (self.unit or 1.0), _HALF)
        self._average(self.recent, self.count, at[good], scaled[good], 0.5)
        self._average(self.older, self.count, at[good], scaled[good], 0.125)
        self.count[at[good]] = np.minimum(self.count[at[good]], 254) + 1
        if norms is not None:
            sizes = _array(norms, np.float64)
            fine = np.isfinite(sizes) & (sizes >= 0)
            self._average(self.norm, self.norms, at[fine], np.minimum(sizes[fine], _HALF), 0.5)
            self.norms[at[fine]] = 1

    @staticmethod
    def _average(
        kept: np.ndarray, count: np.ndarray, at: np.ndarray, values: np.ndarray, weight: float
    ) -> None:
        old = kept[at].astype(np.float64)
        kept[at] = np.where(count[at] == 0, values, old + weight * (values - old))

    def state_dict(self) -> dict[str, Any]:
        """Tensors that share memory with the statistics, and numbers."""
        names = ("recent", "older", "norm", "count", "norms")
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in names}
        return {**tensors, "unit": self.unit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("recent", "older", "norm", "count", "norms"):
            found = state[name].numpy()
            if len(found) != len(self):
                raise InputError(
                    f"the state is of {len(found)} examples, the sampler has {len(self)}: build it "
                    "for the same dataset"
                )
            getattr(self, name)[:] = found
        self.unit = state["unit"]


class LossSampler(Sampler[int]):
    """An order of examples in which those that are hard but learnable come more often.

        sampler = LossSampler(len(dataset), strength=0.5)
        loader = DataLoader(dataset, batch_size=64, sampler=sampler)
        ...
        losses = F.cross_entropy(model(x), y, reduction="none")
        loss = (sampler.importance(indices) * losses).mean()   # unbiased
        sampler.observe(indices, losses)
        ...
        sampler.next_epoch()

    One pass has as many draws as there are examples: example i comes ⌊N p_i⌋ or ⌈N p_i⌉ times,
    N p_i on average (systematic sampling, Madow 1949), in a random order. At strength 0 a pass is
    an ordinary random permutation. N p_i follows from the statistics at the last `next_epoch()`:

        N p ∝ 1 + strength · (h − 1) · (ℓ where h > 1),   h = loss / mean loss, up to `most`

    so saturated examples come less often, down to `least`, and hard ones more often where ℓ, the
    share by which their loss has lately fallen relative to the others', says that they are learned:
    a wrong label that is never learned is not trained on more and more. by="gradient" takes the
    gradient norms for h. `importance` gives 1 / (N p_i): with it the weighted mean over a pass is
    the plain mean, in expectation exactly.

    generator: of the order; None for torch's global one, from which each pass draws one number.
    Resumable: `state_dict()` has weights, statistics, and the place within the pass.
    Raises InputError for settings that cannot be.
    """

    name = "sampling"

    def __init__(
        self,
        examples: int,
        *,
        strength: float = 0.5,
        most: float = 3.0,
        least: float = 0.3,
        by: str = "loss",
        generator: torch.Generator | None = None,
    ) -> None:
        examples = whole_number("examples", examples)
        if not 0 <= strength <= 1:
            raise InputError(f"strength must be in [0, 1], got {strength:g}")
        if not 0 < least <= 1 <= most:
            raise InputError(
                f"least and most must be 0 < least ≤ 1 ≤ most, got {least:g} and {most:g}"
            )
        if by not in ("loss", "gradient"):
            raise InputError(f"by must be 'loss' or 'gradient', got {by!r}")
        self.statistics = ExampleStatistics(examples)
        self.strength, self.most, self.least, self.by = strength, most, least, by
        self.generator = generator
        self.weights = np.ones(examples, np.float32)
        self._seed: int | None = None
        self._taken = 0
        self._again = False

    @property
    def value(self) -> float:
        """The strength, under the name that every knob has."""
        return self.strength

    @value.setter
    def value(self, strength: float) -> None:
        self.strength = min(max(float(strength), 0.0), 1.0)

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[int]:
        if not self._again:
            draw = torch.empty((), dtype=torch.int64).random_(generator=self.generator)
            self._seed, self._taken = int(draw), 0
        self._again = False
        assert self._seed is not None
        order = self._order(self._seed)
        for start in range(self._taken, len(order), _CHUNK):
            for index in order[start : start + _CHUNK].tolist():
                self._taken += 1
                yield index

    def importance(self, indices: Any) -> Tensor:
        """1 / (N p_i) of examples (B,), float32: weights that make the mean loss unbiased."""
        at = _array(indices, np.int64)
        weights = torch.from_numpy(1 / self.weights[at])
        return weights.to(indices.device) if isinstance(indices, Tensor) else weights

    def observe(self, indices: Any, losses: Any, norms: Any = None) -> None:
        """Per-example losses (B,) of a step, and gradient norms where they are known."""
        self.statistics.observe(indices, losses, norms)

    def next_epoch(self) -> None:
        """Makes the weights of the next pass from what was observed; call it between passes."""
        found = self.statistics
        hard = found.norm if self.by == "gradient" else found.recent
        known = found.norms if self.by == "gradient" else found.count
        level = _mean(hard, known)
        self._seed, self._taken = None, 0
        if self.strength == 0 or level == 0:
            self.weights[:] = 1
            return
        falls, examples = 0.0, 0
        for part in _parts(len(self)):
            fall = _fall(found.older[part], found.recent[part])[found.count[part] > 1]
            falls, examples = falls + float(fall.sum()), examples + len(fall)
        usual = falls / examples if examples else 0.0
        for part in _parts(len(self)):
            h = np.minimum(hard[part].astype(np.float64) / level, self.most)
            fall = _fall(found.older[part], found.recent[part])
            learned = np.minimum(fall / usual, 1.0) if usual > 0 else np.ones(len(h))
            # Whether it can be learned shows only after it was seen twice.
            learned[found.count[part] < 2] = 1.0
            more = (h - 1) * np.where(h > 1, learned, 1.0)
            more[known[part] == 0] = 0.0
            self.weights[part] = np.maximum(1 + self.strength * more, self.least)
        self._normalise()

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """All that the order depends on. taken: examples of this pass that were trained on, where a
        loader has drawn more of them in advance."""
        return {
            "strength": self.strength,
            "weights": torch.from_numpy(self.weights),
            "seed": self._seed,
            "taken": self._taken if taken is None else taken,
            "statistics": self.statistics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, place: bool = True) -> None:
        """Goes on from a state: the next pass is the rest of the one in which it was taken.

        Nothing is left of one that had been gone through without `next_epoch()` afterwards.

        place False: the next pass is drawn anew, for loops that find their place by themselves.
        """
        self.statistics.load_state_dict(state["statistics"])
        self.weights[:] = state["weights"].numpy()
        self.strength = float(state["strength"])
        self._seed, self._taken = state["seed"], int(state["taken"])
        self._again = place and self._seed is not None

    def _normalise(self) -> None:
        """Mean 1, and the largest at most `most`: drawn towards 1 where it would be more."""
        total = sum(float(self.weights[part].sum(dtype=np.float64)) for part in _parts(len(self)))
        self.weights *= np.float32(len(self) / total)
        highest = float(self.weights.max())
        if highest > self.most:
            share = np.float32((self.most - 1) / (highest - 1))
            self.weights -= 1
            self.weights *= share
            self.weights += 1

    def _order(self, seed: int) -> np.ndarray:
        """The examples of one pass, int32: systematic sampling, then shuffled."""
        random = np.random.default_rng(seed % 2**63)
        n = len(self)
        order = np.empty(n, np.int32)
        total = sum(float(self.weights[part].sum(dtype=np.float64)) for part in _parts(n))
        # Example i is drawn once for every whole number in (reached before it, reached with it].
        reached, filled = float(random.random()), 0
        for part in _parts(n):
            sums = np.cumsum(self.weights[part], dtype=np.float64) * (n / total) + reached
            ends = np.minimum(np.floor(sums).astype(np.int64), n)
            ends = np.maximum(ends, filled)
            times = np.diff(ends, prepend=filled)
            order[filled : ends[-1]] = np.repeat(
                np.arange(part.start, part.start + len(times), dtype=np.int32), times
            )
            filled, reached = int(ends[-1]), float(sums[-1])
        order[filled:] = n - 1  # a rounding at the very end
        random.shuffle(order)
        return order


def _parts(n: int) -> list[slice]:
    return [slice(i, min(i + _CHUNK, n)) for i in range(0, n, _CHUNK)]


def _mean(values: np.ndarray, known: np.ndarray) -> float:
    total, count = 0.0, 0
    for part in _parts(len(values)):
        there = known[part] > 0
        total += float(values[part][there].sum(dtype=np.float64))
        count += int(there.sum())
    return total / count if count else 0.0


def _fall(older: np.ndarray, recent: np.ndarray) -> np.ndarray:
    """The share by which losses have fallen, in [0, 1]."""
    before = older.astype(np.float64)
    return np.clip((before - recent) / np.maximum(before, 1e-6), 0.0, 1.0)


def _array(values: Any, kind: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    elif isinstance(values, Sequence):
        values = np.asarray(values)
    return np.asarray(values).astype(kind, copy=False)
