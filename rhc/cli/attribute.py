"""`rhc attribute`: what every training row did for a recorded run, and for its predictions."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rhc.cli.recorded import RecordedRun, recorded
from rhc.containers import Kept, tensors_of
from rhc.data_weights import DATA_WEIGHTS, DataWeights, Numbered, RowLosses, row_losses
from rhc.errors import InputError
from rhc.hindsight.attribution import SMOOTH, Smoothness, WholeRun
from rhc.hindsight.whole_run import from_disk, target_of
from rhc.hypergradient.adjoint import Terminal
from rhc.hypergradient.halfway import Keeper
from rhc.report.live import Screen
from rhc.settings.commands import AttributeConfig
from rhc.storage.files import finite, read_json, replace_durably
from rhc.training import memory
from rhc.training.batches import MicroBatches, batch_size
from rhc.training.losses import LossFn
from rhc.training.plant import Plant
from rhc.workload import load_runner, module_of_file

NAME = "attribution"

MOST_ROWS = 300
"""Validation rows whose losses tell how smooth J is."""

HELPS = (
    "what makes J smoother: judging at an average of iterates (--average 0.98), a bounded loss "
    "(--bounded), and training with a lower lr, smooth activations or larger batches"
)


def run(config: AttributeConfig, screen: Screen) -> int:
    with recorded(config, steps=None, judging=config.objective_batches, numbered=True) as known:
        if known.plain.config.data_weights:
            raise InputError(
                f"directory {config.directory} is of a run whose data weights moved, which its "
                "files do not hold step by step; give one that was trained without them"
            )
        if not known.judged:
            raise InputError(
                f"run {known.plain.config.run!r} has no validation data to take J of; give its "
                "Workload a val_loader"
            )
        task = _Task.of(config, known)
        screen.say(
            f"{config.directory}: {len(known.schedule)} steps, {len(task.weights)} "
            f"{task.what}, {len(task.targets)} reverse passes"
        )
        document = task.run(screen)
    _print(screen, document, config.directory)
    return 0


@dataclass(frozen=True)
class _Target:
    """A loss of which derivatives are taken. row: of the validation data, at this place of its
    batch; None for their mean."""

    name: str
    batches: Sequence[Any]
    row: int | None = None
    place: int = 0
    label: int | None = None


@dataclass
class _Task:
    config: AttributeConfig
    known: RecordedRun
    course: WholeRun
    weights: DataWeights
    what: str
    seen: Tensor  # (n,) how often training saw each cell
    labels: Tensor | None  # (n,) of rows
    targets: list[_Target]
    plain: Plant  # without weights
    row_losses: LossFn

    @classmethod
    def of(cls, config: AttributeConfig, known: RecordedRun) -> _Task:
        settings = known.plain.config
        weights, cells, labels = _cells(config, known)

        def plant(loss_fn: LossFn, weights: DataWeights | None = None) -> Plant:
            return Plant(
                known.workload.model,
                known.optimizer,
                loss_fn,
                seed=settings.seed,
                clip_norm=settings.clip_norm,
                clip_value=settings.clip_value,
                data_weights=weights,
            )

        plain = plant(known.workload.loss_fn)
        before = plain.snapshot()
        first = known.batches[0].batch(known.device)
        loss_fn = row_losses(known.workload.loss_fn, known.workload.model, first)
        plain.restore(before)
        seen = torch.zeros(len(weights), dtype=torch.int64)
        for of_batch in cells.values():
            seen.index_add_(0, of_batch, torch.ones_like(of_batch))
        weighed = plant(from_disk(loss_fn, known.device), weights)
        n = settings.accumulate
        steps = [
            MicroBatches(known.batches[i : i + n]) if n > 1 else known.batches[i]
            for i in range(0, len(known.batches), n)
        ]
        course = WholeRun(
            weighed,
            steps,
            known.schedule,
            config.average or None,
            config.product,
            config.memory_budget,
        )
        what = "rows" if config.cells == "rows" else "cells"
        targets = [_Target("validation loss", known.judged)]
        targets += _single_rows(known.judged, config.per_row)
        return cls(config, known, course, weights, what, seen, labels, targets, plain, loss_fn)

    # What is computed ----------------------------------------------------------------------------

    def run(self, screen: Screen) -> dict[str, Any]:
        """attribution.json, after everything has been written."""
        folder = self.config.directory / f"{NAME}-unfinished"
        self._begin(folder)
        device = self.known.device
        memory.reset_peak(device)
        before = memory.current_peak(device)
        paths = [folder / f"target-{m:05d}.safetensors" for m in range(len(self.targets))]
        left = [m for m, path in enumerate(paths) if not path.exists()]
        passes = self.course.passes(
            [self._loss_of(self.targets[m]) for m in left],
            [Keeper(folder / "halfway.safetensors") for _ in left],
            shared=len(paths) > 1,
        )
        for m, h in zip(left, passes, strict=True):
            found = {"derivatives": h.grad[DATA_WEIGHTS], "losses": h.losses}
            own = {
                "value": h.value,
                "result": h.result.name,
                "message": h.result.message,
                "check": h.check,
                "product": h.product,
                "why": h.why,
                "gradients": h.gradient_equivalents,
            }
            replace_durably(paths[m], save(found, {"told": json.dumps(finite(own))}))
            (folder / "halfway.safetensors").unlink(missing_ok=True)
            if len(self.targets) > 1:
                screen.say(f"{m + 1} of {len(self.targets)}: {self.targets[m].name}")
        peak = max(0, memory.current_peak(device) - before)
        derivatives = torch.stack([load_file(path)["derivatives"] for path in paths])
        told = [_metadata(path) for path in paths]
        smooth = self._smoothness(derivatives) if self.config.probes else None
        document = self._document(derivatives, told, smooth, load_file(paths[0])["losses"], peak)
        self._write(derivatives, document)
        shutil.rmtree(folder)
        return document

    def _begin(self, folder: Path) -> None:
        """Keeps what an earlier call with the same settings has left."""
        settings = {
            "run": self.known.plain.to_record(),
            "schedule": self.known.schedule.digest(),
            "cells": [self.config.cells, len(self.weights)],
            "targets": len(self.targets),
            **{n: getattr(self.config, n) for n in ("bounded", "average", "objective_batches")},
            "product": self.config.product,
            "memory_budget": self.config.memory_budget,
        }
        path = folder / "settings.json"
        settings = json.loads(json.dumps(settings, default=str))
        if path.exists() and read_json(path, lambda told: None) == settings:
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        replace_durably(path, (json.dumps(settings) + "\n").encode())

    def _smoothness(self, derivatives: Tensor) -> Smoothness:
        """Of the losses that are attributed, then of the first validation rows."""
        averaged = self.config.average > 0
        first = [self._loss_of(target) for target in self.targets]
        batches, count = list[Any](), 0
        for batch in self.known.judged:
            if count < MOST_ROWS:
                batches.append(batch)
                count += batch_size(batch)
        rows = [target_of(self.plain, [b], self._each, averaged=averaged) for b in batches]

        def values(model: nn.Module) -> Tensor:
            own = torch.stack([loss(model) for loss in first])
            return torch.cat([own, *(loss(model) for loss in rows)])[: len(first) + MOST_ROWS]

        return self.course.smoothness(values, self.config.probes, derivatives)

    def _loss_of(self, target: _Target) -> Terminal:
        of_row = target.row is not None
        if not of_row and not self.config.bounded:
            return target_of(self.plain, target.batches, averaged=self.config.average > 0)

        def loss_of(batch: Any) -> Tensor:
            each = self._each(batch)
            return each[target.place] if of_row else each.mean()

        return target_of(self.plain, target.batches, loss_of, averaged=self.config.average > 0)

    def _each(self, batch: Kept) -> Tensor:
        """(B,) the losses of a validation batch's rows."""
        found = self.row_losses(self.known.workload.model, batch.opened())
        losses = found[0] if isinstance(found, tuple) else found
        each: Tensor = losses.each if isinstance(losses, RowLosses) else losses
        return 1 - torch.exp(-each) if self.config.bounded else each

    # What is written -----------------------------------------------------------------------------

    def _document(
        self,
        derivatives: Tensor,
        told: Sequence[dict[str, Any]],
        smooth: Smoothness | None,
        losses: Tensor,
        peak: int,
    ) -> dict[str, Any]:
        apart = [abs(a - b) for a, b in zip(losses.tolist(), self.known.losses, strict=True)]
        steps = len(self.known.schedule)
        spent = self.course.rolls + sum(t.pop("gradients") for t in told) / steps
        targets = [
            {
                "name": target.name,
                "row": target.row,
                "label": target.label,
                **of_target,
                "helpful": self._extreme(derivatives[m], self.config.show, 1),
                "harmful": self._extreme(derivatives[m], self.config.show, -1),
            }
            for m, (target, of_target) in enumerate(zip(self.targets, told, strict=True))
        ]
        found: dict[str, Any] = finite(
            {
                "format": "rhc.attribution",
                "version": 1,
                "steps": steps,
                "cells": self.config.cells,
                "count": len(self.weights),
                "names": self.weights.names,
                "objective": {
                    "batches": len(self.known.judged),
                    "average": self.config.average or None,
                    "bounded": self.config.bounded,
                },
                "targets": targets,
                "smoothness": None if smooth is None else vars(smooth),
                "furthest_from_tape": max(apart),
                "memory_budget": self.config.memory_budget,
                "peak_memory_bytes": peak,
                "plain_run_equivalents": spent,
            }
        )
        return found

    def _extreme(self, of_cells: Tensor, count: int, sign: int) -> list[dict[str, Any]]:
        """The cells of the lowest (sign 1) or highest derivatives, if of that sign."""
        order = (sign * of_cells).argsort(stable=True)[:count].tolist()
        return [
            {
                "cell": self._name(c),
                "label": None if self.labels is None else int(self.labels[c]),
                "derivative": float(of_cells[c]),
                "seen": int(self.seen[c]),
            }
            for c in order
            if sign * float(of_cells[c]) < 0
        ]

    def _name(self, cell: int) -> int | str:
        return cell if self.weights.names is None else self.weights.names[cell]

    def _write(self, derivatives: Tensor, document: dict[str, Any]) -> None:
        directory = self.config.directory
        told = [target["value"] for target in document["targets"]]
        values = [math.nan if value is None else value for value in told]
        tensors = {
            "derivatives": derivatives,
            "values": torch.tensor(values, dtype=torch.float64),
            "rows": torch.tensor([-1 if t.row is None else t.row for t in self.targets]),
            "seen": self.seen,
        }
        if self.labels is not None:
            tensors["labels"] = self.labels
        replace_durably(directory / f"{NAME}.safetensors", save(tensors))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        label = [] if self.labels is None else ["label"]
        writer.writerow(["cell", *label, "seen", *(t.name for t in self.targets)])
        for c in derivatives[0].argsort(stable=True).tolist():
            own = [] if self.labels is None else [int(self.labels[c])]
            numbers = (f"{x:.9g}" for x in derivatives[:, c].tolist())
            writer.writerow([self._name(c), *own, int(self.seen[c]), *numbers])
        replace_durably(directory / f"{NAME}.csv", text.getvalue().encode())
        text_of = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        replace_durably(directory / f"{NAME}.json", text_of.encode())


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        told: dict[str, Any] = json.loads(file.metadata()["told"])
    return told


# Cells and targets --------------------------------------------------------------------------------


def _cells(
    config: AttributeConfig, known: RecordedRun
) -> tuple[DataWeights, dict[Path, Tensor], Tensor | None]:
    """(a weight of 1 per cell, the cells (B,) of every batch by its path, the rows' labels)."""
    cell_of, count = _cell_of(config, known)
    found: dict[Path, Tensor] = {}
    labels: dict[int, int] = {}
    for ref in known.batches:
        batch = ref.batch(torch.device("cpu"))
        found[ref.path] = torch.as_tensor(cell_of(batch)).detach().cpu().long()
        own = _labels(batch)
        if config.cells == "rows" and own is not None:
            labels |= zip(batch.numbers.tolist(), own.tolist(), strict=True)
    if count is None:
        count = max(int(cells.max()) for cells in found.values()) + 1
    weights = DataWeights(count, lambda ref: found[ref.path])
    if not labels:
        return weights, found, None
    of_rows = torch.full((len(weights),), -1)
    of_rows[torch.tensor(list(labels))] = torch.tensor(list(labels.values()))
    return weights, found, of_rows


def _cell_of(
    config: AttributeConfig, known: RecordedRun
) -> tuple[Callable[[Any], Any], int | Sequence[str] | None]:
    """(batch -> its cells, their number or names where they are known)."""
    if config.cells == "rows":
        if not known.numbered:
            raise InputError(
                "the rows of train_loader have no numbers: it is no DataLoader over a map-style "
                "dataset; give --cells FILE.py:NAME, a function of the batch that tells them"
            )
        loader: Any = known.workload.train_loader
        return lambda batch: batch.numbers, len(loader.dataset)
    if config.cells == "classes":

        def classes(batch: Any) -> Tensor:
            labels = _labels(batch)
            if labels is None:
                raise InputError("cells: batches have no integer label per row, so no classes")
            return labels

        return classes, None
    if config.cells == "own":
        plain = known.plain.config
        made = load_runner(plain.run)(seed=plain.seed, data=plain.data, **known.plain.sizes)
        own = made.data_weights
        if own is None or own.of_terms:
            raise InputError(
                f"cells: the Workload of run {plain.run!r} has no data_weights whose cells rows "
                "belong to; give --cells rows, classes or FILE.py:NAME"
            )
        return lambda batch: own.cells(_sample(batch)), own.names or len(own)
    path, found, name = config.cells.rpartition(":")
    if not found or not path.endswith(".py"):
        raise InputError(f"cells must be rows, classes, own or FILE.py:NAME, got {config.cells!r}")
    function = getattr(module_of_file(Path(path).resolve()), name, None)
    if not callable(function):
        raise InputError(f"cells: {path} defines no function {name!r}")
    return lambda batch: function(_sample(batch)), None


def _sample(batch: Any) -> Any:
    return batch.sample if isinstance(batch, Numbered) else batch


def _labels(batch: Any) -> Tensor | None:
    """The last tensor of integers with one per row, (B,)."""
    inner, size = _sample(batch), batch_size(batch)
    whole = [t for t in tensors_of(inner) if t.shape == (size,) and not t.is_floating_point()]
    return whole[-1].long() if whole else None


def _single_rows(judged: Sequence[Any], count: int) -> list[_Target]:
    """The first `count` rows of the validation data."""
    found: list[_Target] = []
    for batch in judged:
        labels = _labels(batch)
        for i in range(min(batch_size(batch), count - len(found))):
            label = None if labels is None else int(labels[i])
            found.append(_Target(f"validation row {len(found)}", [batch], len(found), i, label))
    return found


# What is shown ------------------------------------------------------------------------------------

SHOWN = 3
"""Predictions whose rows are shown in the terminal; all are in the files."""


def _print(screen: Screen, document: dict[str, Any], directory: Path) -> None:
    apart = document["furthest_from_tape"]
    if apart != 0:
        screen.say(f"note      rolled losses differ from the tape by up to {apart}")
    for target in document["targets"][: 1 + SHOWN]:
        label = "" if target["label"] is None else f", label {target['label']}"
        screen.say(f"{target['name']}{label}: J {target['value']}")
        if target["result"] != "successful":
            screen.say(f"  {target['result']}: {target['message']}")
        for kind in ("helpful", "harmful"):
            for row in target[kind]:
                of = "" if row["label"] is None else f"  label {row['label']}"
                screen.say(f"  {kind}  {row['cell']!s:>8}  dJ/dw {row['derivative']:+.4g}{of}")
    smooth = document["smoothness"]
    if smooth is not None:
        screen.say(
            f"metasmoothness {_number(smooth['metasmoothness'])}, agreement of predicted and "
            f"rolled changes {_number(smooth['agreement'])}, over {smooth['probes']} directions"
        )
        if (smooth["metasmoothness"] or 0.0) < SMOOTH:
            screen.say(
                f"  J is far from linear in the weights along random halves of them; {HELPS}"
            )
    screen.say(
        f"cost      {document['plain_run_equivalents']:.2f} plain runs, peak "
        f"{document['peak_memory_bytes'] / 1e6:.0f} MB above what was there"
    )
    screen.say(f"files     {directory / NAME}.safetensors, .csv, .json")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
