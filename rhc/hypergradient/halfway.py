"""A reverse pass that is saved on its way back, and goes on from there to the same bits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from rhc.hypergradient.optimizer_step import Costate
from rhc.storage.files import replace_durably


@dataclass(frozen=True)
class Halfway:
    """What a pass knows when steps from k on are done. norms: of the costates, (K + 1, 2). rows:
    per step dJ/dw of the rows of each micro-batch; empty before k."""

    k: int
    costate: Costate  # λ_k
    norms: Tensor
    rows: Sequence[Sequence[Tensor]]


class Keeper:
    """Keeps a pass in a file, at most every `seconds`, so that it survives the process."""

    def __init__(self, path: Path, seconds: float = 30.0) -> None:
        self.path, self.seconds = path, seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.seconds

    def save(self, halfway: Halfway) -> None:
        costate = halfway.costate
        found = {f"theta.{b}": t for b, t in enumerate(costate.parameters) if t is not None}
        for b, slots in enumerate(costate.optimizer):
            found |= {f"slot.{b}.{n}": t for n, t in enumerate(slots) if t is not None}
        found |= {f"statistic.{name}": t for name, t in costate.statistics.items()}
        for i, parts in enumerate(halfway.rows):
            found |= {f"rows.{i}.{n}": t for n, t in enumerate(parts)}
        shape = [len(costate.parameters), len(halfway.rows)]
        counts = [len(slots) for slots in costate.optimizer]
        found["shape"] = torch.tensor([halfway.k, *shape, *counts])
        found["norms"] = halfway.norms
        # safetensors refuses tensors that share memory.
        data = save({n: t.detach().cpu().contiguous().clone() for n, t in found.items()})
        replace_durably(self.path, data)
        self._last = time.monotonic()

    def load(self, device: torch.device) -> Halfway | None:
        if not self.path.exists():
            return None
        found = load_file(self.path)
        k, blocks, steps, *counts = found.pop("shape").tolist()
        rows: list[list[Tensor]] = [[] for _ in range(steps)]
        for name in sorted(found, key=_place):
            if name.startswith("rows."):
                rows[_place(name)[0]].append(found[name])
        there = {n: t.to(device) for n, t in found.items() if not n.startswith("rows.")}
        costate = Costate(
            [there.get(f"theta.{b}") for b in range(blocks)],
            [[there.get(f"slot.{b}.{n}") for n in range(c)] for b, c in enumerate(counts)],
            {
                n.removeprefix("statistic."): t
                for n, t in there.items()
                if n.startswith("statistic.")
            },
        )
        return Halfway(k, costate, there["norms"], rows)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def _place(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())
