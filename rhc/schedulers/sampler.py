"""Importance sampling by learning progress, with weights that keep the loss unbiased."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from rhc.errors import InputError, whole_number

_CHUNK = 1 << 18
_HALF = float(np.finfo(np.float16).max)
_KEPT = ("recent", "older", "count")


class LossSampler(Sampler[int]):
    """A sampler that draws hard but learnable examples more often.

        sampler = LossSampler(len(dataset), strength=0.5)
        loader = DataLoader(dataset, batch_size=64, sampler=sampler)
        ...
        losses = F.cross_entropy(model(x), y, reduction="none")
        loss = (sampler.importance(indices) * losses).mean()   # unbiased
        sampler.observe(indices, losses)
        ...
        sampler.next_epoch()

    A pass has N draws; example i occurs ⌊N p_i⌋ or ⌈N p_i⌉ times (systematic sampling, Madow 1949):

        N p ∝ 1 + strength · (h − 1) · (ℓ where h > 1),   h = loss / mean loss

    ℓ is the recent relative fall of an example's loss, so that wrong labels, which are never
    learned, are not drawn ever more often. `importance` is 1 / (N p_i): the weighted mean over a
    pass equals the plain mean in expectation. Strength 0 gives an ordinary random permutation.
    Memory: 9 bytes per example (12 by gradient) and 4 more during a pass; losses in half precision.

    Args:
        examples: Size N of the dataset.
        strength: In [0, 1].
        most: Largest N p_i.
        least: Smallest 1 + strength · …, before scaling to mean 1.
        by: "loss", or "gradient" to use norms of gradients for h.
        generator: Of the order; None for torch's global one.

    Raises:
        InputError: An argument is out of range.
    """

    name = "sampling"

    def __init__(
        self,
        examples: int,
        *,
        strength: float = 0.5,
        most: float = 3.0,
        least: float = 0.3,
        by: Literal["loss", "gradient"] = "loss",
        generator: torch.Generator | None = None,
    ) -> None:
        examples = whole_number("examples", examples)
        if not 1 <= examples < 2**31:
            raise InputError(f"examples must be in [1, 2³¹), got {examples}; sample shards of more")
        if not 0 <= strength <= 1:
            raise InputError(f"strength must be in [0, 1], got {strength:g}")
        if not 0 < least <= 1 <= most:
            raise InputError(
                f"least and most must be 0 < least ≤ 1 ≤ most, got {least:g} and {most:g}"
            )
        if by not in ("loss", "gradient"):
            raise InputError(f"by must be 'loss' or 'gradient', got {by!r}")
        self.by = by
        self.recent = np.zeros(examples, np.float16)
        """Mean loss per example, weight ½ for the newest, in units of `unit`."""
        self.older = np.zeros(examples, np.float16)
        """The same with weight ⅛; the difference measures learning."""
        self.count = np.zeros(examples, np.uint8)
        """Observations per example, up to 255."""
        self.norm = np.zeros(examples if by == "gradient" else 0, np.float16)
        """Mean gradient norm per example, weight ½ for the newest."""
        self.norms = np.zeros(len(self.norm), np.uint8)
        """Whether a norm was observed."""
        self.unit: float | None = None
        """Mean of the first losses, for the range of half precision."""
        self.strength, self.most, self.least = strength, most, least
        self.generator = generator
        self.weights = np.ones(examples, np.float32)
        self._seed: int | None = None
        self._taken = 0
        self._again = False

    @property
    def value(self) -> float:
        return self.strength

    @value.setter
    def value(self, strength: float) -> None:
        self.strength = min(max(float(strength), 0.0), 1.0)

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[int]:
        if self._seed is None or not self._again:
            draw = torch.empty((), dtype=torch.int64).random_(generator=self.generator)
            self._seed, self._taken = int(draw), 0
        self._again = False
        order = self._order(self._seed)
        for start in range(self._taken, len(order), _CHUNK):
            for index in order[start : start + _CHUNK].tolist():
                self._taken += 1
                yield index

    def importance(self, indices: Any) -> Tensor:
        """1 / (N p_i) for indices (B,), as float32: weights for an unbiased mean loss."""
        at = _array(indices, np.int64)
        weights = torch.from_numpy(1 / self.weights[at])
        return weights.to(indices.device) if isinstance(indices, Tensor) else weights

    def observe(self, indices: Any, losses: Any, norms: Any = None) -> None:
        """Records the losses of a step's examples, and the norms of their gradients.

        Values that are negative or not finite are ignored; of duplicates the last counts.

        Args:
            indices: (B,).
            losses: (B,).
            norms: (B,), if sampling by gradient.

        Raises:
            InputError: Shapes differ, or an index is outside the dataset.
        """
        at, values = _array(indices, np.int64), _array(losses, np.float64)
        if at.shape != values.shape or at.ndim != 1:
            raise InputError(
                f"indices and losses must be of one length, got shapes {at.shape} and "
                f"{values.shape}; give one loss per example"
            )
        if len(at) and not (at.min() >= 0 and at.max() < len(self)):
            raise InputError(
                f"indices must be in [0, {len(self)}), got {at.min()} to {at.max()}; build the "
                "sampler for the whole dataset"
            )
        if self.by == "gradient" and norms is not None:
            sizes = _array(norms, np.float64)
            fine = np.isfinite(sizes) & (sizes >= 0)
            place, sizes = at[fine], np.minimum(sizes[fine], _HALF)
            old = self.norm[place].astype(np.float64)
            self.norm[place] = np.where(self.norms[place] == 0, sizes, old + 0.5 * (sizes - old))
            self.norms[place] = 1
        good = np.isfinite(values) & (values >= 0)
        at, values = at[good], values[good]
        if self.unit is None and len(at):
            mean = float(values.mean())
            self.unit = mean if mean > 0 else 1.0
        with np.errstate(over="ignore"):  # unit may be subnormal
            values = np.minimum(values / (self.unit or 1.0), _HALF)
        unseen = self.count[at] == 0
        for kept, weight in ((self.recent, 0.5), (self.older, 0.125)):
            old = kept[at].astype(np.float64)
            kept[at] = np.where(unseen, values, old + weight * (values - old))
        self.count[at] = np.minimum(self.count[at], 254) + 1

    def next_epoch(self) -> None:
        """Computes the weights of the next pass; call it between passes."""
        parts = _parts(len(self))
        self._seed, self._taken = None, 0
        gradient = self.by == "gradient"
        hard, known = (self.norm, self.norms) if gradient else (self.recent, self.count)
        level = _mean(hard[part][known[part] > 0] for part in parts)
        if self.strength == 0 or level == 0:
            self.weights[:] = 1
            return
        usual = _mean(self._falls(part)[self.count[part] > 1] for part in parts)
        for part in parts:
            h = np.minimum(hard[part].astype(np.float64) / level, self.most)
            learned = np.minimum(self._falls(part) / usual, 1.0) if usual > 0 else np.ones(len(h))
            # A fall needs two observations.
            learned[self.count[part] < 2] = 1.0
            more = (h - 1) * np.where(h > 1, learned, 1.0)
            more[known[part] == 0] = 0.0
            self.weights[part] = np.maximum(1 + self.strength * more, self.least)
        self._normalise()

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """Everything that the order depends on; tensors share memory with the sampler.

        Args:
            taken: Examples of this pass trained on so far, if the loader prefetches.
        """
        return {
            "strength": self.strength,
            "weights": torch.from_numpy(self.weights),
            "seed": self._seed,
            "taken": self._taken if taken is None else taken,
            "statistics": {
                "unit": self.unit,
                **{name: torch.from_numpy(getattr(self, name)) for name in self._kept},
            },
        }

    def load_state_dict(self, state: Mapping[str, Any], *, place: bool = True) -> None:
        """Restores `state_dict`; the next pass is the rest of the interrupted one.

        Args:
            state: From `state_dict`.
            place: False to draw a new pass, for loops that restore the position themselves.
        """
        if len(state["weights"]) != len(self):
            raise InputError(
                f"the state is of {len(state['weights'])} examples, the sampler has {len(self)}: "
                "build it for the same dataset"
            )
        self.weights[:] = state["weights"].numpy()
        for name in self._kept:
            getattr(self, name)[:] = state["statistics"][name].numpy()
        self.unit = state["statistics"]["unit"]
        self.strength = float(state["strength"])
        self._seed, self._taken = state["seed"], int(state["taken"])
        self._again = place

    @property
    def _kept(self) -> tuple[str, ...]:
        return (*_KEPT, "norm", "norms") if self.by == "gradient" else _KEPT

    def _falls(self, part: slice) -> np.ndarray:
        """The recent relative fall of these examples' losses, in [0, 1]."""
        before = self.older[part].astype(np.float64)
        return np.clip((before - self.recent[part]) / np.maximum(before, 1e-6), 0.0, 1.0)

    def _normalise(self) -> None:
        """Scales the weights to mean 1 and shrinks them towards 1 until none exceeds `most`."""
        total = sum(float(self.weights[part].sum(dtype=np.float64)) for part in _parts(len(self)))
        self.weights *= np.float32(len(self) / total)
        highest = float(self.weights.max())
        if highest > self.most:
            share = np.float32((self.most - 1) / (highest - 1))
            self.weights -= 1
            self.weights *= share
            self.weights += 1

    def _order(self, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed % 2**63)
        n = len(self)
        order = np.empty(n, np.int32)
        total = sum(float(self.weights[part].sum(dtype=np.float64)) for part in _parts(n))
        # Example i is drawn once per integer in (reached before it, reached with it].
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
        order[filled:] = n - 1  # rounding of the last sum
        random.shuffle(order)
        return order


def _parts(n: int) -> list[slice]:
    return [slice(i, min(i + _CHUNK, n)) for i in range(0, n, _CHUNK)]


def _mean(parts: Iterable[np.ndarray]) -> float:
    total, count = 0.0, 0
    for part in parts:
        total += float(part.sum(dtype=np.float64))
        count += len(part)
    return total / count if count else 0.0


def _array(values: Any, kind: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values).astype(kind, copy=False)
