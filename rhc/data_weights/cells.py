"""The weights by cell, which cell each row of a batch belongs to, and their files."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, WeightedRandomSampler

from rhc.data_weights.course import Course
from rhc.errors import InputError, whole_number
from rhc.storage.files import MOST_JSON_BYTES, parsed_json, read_regular, reason, replace_durably

CellOf = Callable[[Any], Any]
"""batch -> LongTensor (B,), the cell of each row."""

DATA_WEIGHTS = "data_weights"
"""The name of derivatives by data weights, and of their disagreement."""

FORMAT, VERSION = "rhc.data_weights", 1

BOUNDS = (math.exp(-6), math.exp(3))
"""Smallest and largest weight of a cell."""

COURSE = ".course.safetensors"

_HEADER = 2**20
"""Bytes that a weights file may have beyond its numbers."""


def index_of(batch: Any) -> Any:
    """batch["index"], as `rhc.indexed` yields it."""
    if not isinstance(batch, Mapping) or "index" not in batch:
        raise InputError(
            f"a batch ({type(batch).__name__}) has no 'index': wrap the dataset in rhc.indexed, or "
            "give DataWeights a cell_of, batch -> (B,) cells"
        )
    return batch["index"]


class DataWeights:
    """A weight w_c > 0 for every cell c, on the losses of the rows that belong to it.

    A step's loss is Σ_i ŵ_i ℓ_i / B over its B rows, ŵ_i = w_c(i) B / Σ_j w_c(j): the weights of a
    step have mean 1, so that lr keeps its meaning. Where cells are loss terms, loss_fn returns a
    mapping name -> scalar or (B,), and the loss is their sum, with weights of mean 1.

    Args:
        cells: Number of cells n, or their names; the names of loss terms, if loss_fn returns those.
        cell_of: batch -> (B,) integers in [0, n), the cell of each row. Default batch["index"];
            not used where cells are loss terms.
        values: (n,) initial weights, any positive numbers; default 1 for every cell.
        frozen: Cells that keep their weight.
        bounds: Smallest and largest weight.
        course: Of few cells, their weights at every step, in place of values, which are then the
            last of them; a Runner that moves weights moves all of the course.

    Raises:
        InputError: An argument is invalid.
    """

    def __init__(
        self,
        cells: int | Sequence[str],
        cell_of: CellOf | None = None,
        *,
        values: Tensor | None = None,
        frozen: Sequence[int] | Tensor = (),
        bounds: tuple[float, float] = BOUNDS,
        course: Course | None = None,
    ) -> None:
        self.names: tuple[str, ...] | None = None
        if not isinstance(cells, (int, str)) and isinstance(cells, Sequence):
            self.names, cells = tuple(cells), len(cells)
            if not all(isinstance(n, str) for n in self.names) or len(set(self.names)) < cells:
                raise InputError(f"cells must be different names, got {list(self.names)!r:.80}")
        count = whole_number("cells", cells)
        if count < 1:
            raise InputError(f"cells must be ≥ 1, got {count}: give their number, or their names")
        if cell_of is not None and not callable(cell_of):
            raise InputError(
                f"cell_of must be a function of the batch, got {type(cell_of).__name__}; write "
                'lambda batch: batch["index"]'
            )
        low, high = map(float, bounds)
        if not 0 < low <= 1 <= high < math.inf:
            raise InputError(f"bounds of data weights must be (in (0, 1], ≥ 1), got {bounds}")
        self.of_terms = self.names is not None and cell_of is None
        """Whether the cells are terms of the loss."""
        self.cell_of = index_of if cell_of is None else cell_of
        self.bounds = (low, high)
        given = torch.ones(count) if values is None else torch.as_tensor(values).detach().cpu()
        given = given if given.is_floating_point() else given.float()
        if given.shape != (count,) or not bool(((given > 0) & given.isfinite()).all()):
            raise InputError(
                f"values must be ({count},) positive numbers, one per cell, got shape "
                f"{tuple(given.shape)}"
            )
        self._raw = given / given.mean()
        self.course: Course | None = None
        if course is not None:
            self._follow(course)
        self.evidence: dict[str, Tensor] = {}
        """What a file says of how often cells were seen (count), and how (total)."""
        self.frozen = self._mask(frozen)

    def _follow(self, course: Course) -> None:
        if course.values.shape[1] != len(self):
            raise InputError(
                f"the course has {course.values.shape[1]} cells, and there are {len(self)}"
            )
        self.course, self._raw = course, course.last.clone()

    def over(self, course: Course) -> DataWeights:
        """These cells with a course, at whose end they have its last weights."""
        found = copy.copy(self)
        found._follow(course)
        return found

    def stretched(self, steps: int) -> DataWeights:
        """These weights for a run of `steps`: a course is stretched, others stay."""
        return self if self.course is None else self.over(self.course.stretched(steps))

    def _mask(self, frozen: Sequence[int] | Tensor) -> Tensor | None:
        """(n,) flags; None where no cell is frozen."""
        cells = torch.as_tensor(frozen).detach().cpu()
        if not cells.numel():
            return None
        if cells.dtype == torch.bool and cells.shape == (len(self),):
            return cells.clone()
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[self.checked(cells)] = True
        return mask

    def __len__(self) -> int:
        return len(self._raw)

    def __repr__(self) -> str:
        low, high = float(self.values.min()), float(self.values.max())
        return f"DataWeights({len(self)} cells, weights {low:.3g} to {high:.3g})"

    @property
    def values(self) -> Tensor:
        """(n,) weights of mean 1, of the dtype that was given; default float32."""
        return self._raw / self._raw.mean()

    def cells(self, batch: Any) -> Tensor:
        """(B,) LongTensor on the CPU: the cell of each row, checked.

        Raises:
            InputError: cell_of does not give one cell in [0, n) per row.
        """
        return self.checked(self.cell_of(batch))

    def checked(self, cells: Any) -> Tensor:
        try:
            found = torch.as_tensor(cells).detach().cpu().contiguous()
        except (TypeError, ValueError, RuntimeError):
            found = None
        if found is None or found.dim() != 1 or found.is_floating_point() or found.is_complex():
            got = type(cells).__name__ if found is None else f"{found.dtype}, {tuple(found.shape)}"
            raise InputError(f"the cells of a batch must be (B,) integers, one per row, got {got}")
        found = found.long()
        if found.numel() and not (int(found.min()) >= 0 and int(found.max()) < len(self)):
            wrong = found[(found < 0) | (found >= len(self))]
            raise InputError(
                f"cell {int(wrong[0])} is out of range: there are {len(self)} cells, 0 to "
                f"{len(self) - 1}; give DataWeights(cells=…) as many as cell_of tells apart"
            )
        return found

    def at(self, cells: Tensor, step: int | None = None) -> Tensor:
        """(B,) float64 weights of these cells, not scaled; by the course at a step, if any."""
        own = self._raw[cells].double()
        if self.course is None or step is None:
            return own
        moved = own / self.course.last[cells].double()  # exactly 1 until weights move
        return self.course.at(step)[cells].double() * moved

    def along(self, cells: Tensor, step: int | None) -> Tensor | None:
        """(B,) the course's weights at a step over its last ones; None without a course."""
        if self.course is None or step is None:
            return None
        return self.course.at(step)[cells].double() / self.course.last[cells].double()

    def by_step(self, start: int, stop: int) -> dict[int, Tensor]:
        """Step -> (n,) the weights from it on, for the steps of [start, stop) where they change."""
        if self.course is None:
            return {start: self._raw.clone()}
        every = torch.arange(len(self))
        changes = self.course.changes(start, stop)
        return {step: self.at(every, step).to(self._raw.dtype) for step in changes}

    def adopt(self, raw: Tensor) -> None:
        """Takes over (n,) weights as they are, from a checkpoint."""
        if raw.shape != self._raw.shape:
            raise ValueError(f"data weights of {len(raw)} cells, not {len(self)}")
        self._raw = raw.to(self._raw.dtype, copy=True)

    @property
    def raw(self) -> Tensor:
        """(n,) weights as they are kept, whose mean need not be 1."""
        return self._raw

    def moved(self, cells: Tensor, by: Tensor) -> Tensor:
        """(m,) the weights of `cells` (m,) times exp(by), within the bounds; frozen cells stay."""
        now = self._raw[cells]
        found = (now.double() * by.double().exp()).clamp(*self.bounds).to(now.dtype)
        return found if self.frozen is None else torch.where(self.frozen[cells], now, found)

    def move(self, cells: Tensor, by: Tensor) -> None:
        """Gives `cells`, each once, their weights of `moved`."""
        self._raw[cells] = self.moved(cells, by)

    def describe(self) -> dict[str, Any]:
        """What a run's numbers depend on, for config.json."""
        whole = self._raw.double()
        return {
            "cells": len(self) if self.names is None else list(self.names),
            "first": [float(whole.sum()), float(whole.square().sum())],
            "frozen": 0 if self.frozen is None else int(self.frozen.sum()),
            "bounds": list(self.bounds),
            **({} if self.course is None else {"course": self.course.digest()}),
        }

    def seen(self, cell: int) -> tuple[int, float]:
        """(windows that saw a cell, the mean of its slopes there), as read from a run's file."""
        if "count" not in self.evidence:
            return 0, 0.0
        count = int(self.evidence["count"][cell])
        return count, float(self.evidence["total"][cell]) / max(count, 1)

    # Plain loops ---------------------------------------------------------------------------------

    def weigh(self, losses: Tensor, batch: Any, step: int | None = None) -> Tensor:
        """The scalar loss of a plain loop: Σ_i ŵ_i ℓ_i / B of the rows' losses (B,). step: of the
        optimizer, where a course is followed; else the weights at its end count."""
        weights = self.at(self.cells(batch), step)
        if losses.shape != weights.shape:
            raise InputError(
                f"losses must be one per row, ({len(weights)},), got {tuple(losses.shape)}; use "
                "reduction='none'"
            )
        weights = weights.to(losses.device, losses.dtype)
        return (weights * losses).sum() / weights.sum()

    def sampler(self, num_samples: int | None = None, **options: Any) -> WeightedRandomSampler:
        """torch's WeightedRandomSampler, which draws cells in proportion to their weights; for
        cells that are the rows of a dataset. options: of that class, such as generator."""
        weights: Any = self.values
        return WeightedRandomSampler(weights, num_samples or len(self), **options)

    # Files ---------------------------------------------------------------------------------------

    def save(self, path: str | Path, evidence: Mapping[str, Tensor] | None = None) -> None:
        """Writes PATH (safetensors), beside it with the ending .json what the cells are, and a
        course with the ending .course.safetensors. evidence: further (n,) tensors."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"weights": self.values, **(evidence or {})}
        if self.frozen is not None:
            tensors["frozen"] = self.frozen
        data = save_tensors(tensors)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "cells": len(self),
            "names": None if self.names is None else list(self.names),
            "bounds": list(self.bounds),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        if self.course is not None:
            course = save_tensors(self.course.to_tensors())
            document["course"] = {
                "steps": len(self.course),
                "bytes": len(course),
                "sha256": hashlib.sha256(course).hexdigest(),
            }
            replace_durably(path.with_suffix(COURSE), course)
        replace_durably(path, data)
        replace_durably(path.with_suffix(".json"), (json.dumps(document, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path, cell_of: CellOf | None = None) -> DataWeights:
        """Reads what `save` wrote; cell_of as for the class, since files hold no code.

        Raises:
            InputError: A file is missing, damaged, or not one of data weights.
        """
        path = Path(path)
        try:
            document = parsed_json(
                read_regular(path.with_suffix(".json").resolve(), MOST_JSON_BYTES)
            )
            if not isinstance(document, dict) or document.get("format") != FORMAT:
                raise ValueError("its .json is not that of data weights")
            if document.get("version") != VERSION:
                raise ValueError(f"it has version {document.get('version')!r}, not {VERSION}")
            cells = whole_number("cells", document.get("cells"))
            tensors = _read(path, 24 * max(cells, 0) + _HEADER, document)
            names, bounds = document.get("names"), document["bounds"]
            if names is not None and (not isinstance(names, list) or len(names) != cells):
                raise ValueError("it has another number of names than of cells")
            low, high = bounds
            found = cls(
                cells if names is None else names,
                cell_of,
                values=tensors.pop("weights"),
                frozen=tensors.pop("frozen", ()),
                bounds=(low, high),
                course=_read_course(path.with_suffix(COURSE), document.get("course"), cells),
            )
            found.evidence = tensors
            return found
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            why = reason(error) if isinstance(error, (OSError, ValueError)) else repr(error)
            raise InputError(
                f"cannot read data weights {path}: {why}; give the file that DataWeights.save wrote"
            ) from error


def _read(path: Path, most: int, document: Mapping[str, Any]) -> dict[str, Tensor]:
    data = read_regular(path.resolve(), most)
    digest = hashlib.sha256(data).hexdigest()
    if [len(data), digest] != [document.get("bytes"), document.get("sha256")]:
        raise ValueError(f"{path.name} is not the file that its .json was written with")
    return load_tensors(data)


def _read_course(path: Path, document: Any, cells: int) -> Course | None:
    if document is None:
        return None
    steps = whole_number("steps", document["steps"])
    most = (8 * cells + 8) * max(steps, 0) + _HEADER
    return Course.from_tensors(steps, _read(path, most, document))


def write_csv(weights: DataWeights, path: Path) -> None:
    """A line per cell, the lowest weight first: cell, weight, windows that saw it, and the mean of
    its slopes there in root mean squares (> 0: more of it raised J)."""
    values = weights.values
    rows = ["cell,weight,windows,slope"]
    for c in values.argsort(stable=True).tolist():
        name = c if weights.names is None else weights.names[c]
        seen, mean = weights.seen(c)
        rows.append(f"{name},{float(values[c]):.6g},{seen},{mean:.4g}")
    replace_durably(path, ("\n".join(rows) + "\n").encode())


class _Indexed(Dataset[dict[str, Any]]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "sample": self.dataset[index]}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if callable(fetch) else [self.dataset[i] for i in indices]
        return [{"index": i, "sample": s} for i, s in zip(indices, samples, strict=True)]


def indexed(dataset: Dataset[Any]) -> Dataset[dict[str, Any]]:
    """The dataset with every sample as {"index": i, "sample": dataset[i]}, so that a batch has the
    rows' indices as batch["index"], (B,).

    Raises:
        InputError: The dataset is not map-style: it has no `__getitem__` or no length.
    """
    sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or not sized:
        raise InputError(
            f"{type(dataset).__name__} cannot be indexed: it needs __getitem__ and __len__; yield "
            "the index of every sample yourself, and give DataWeights a cell_of"
        )
    return _Indexed(dataset)
