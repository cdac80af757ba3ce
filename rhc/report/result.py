"""RunResult: what `Runner.fit` returns, and how it is looked at in a script or a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rhc.data_weights import DataWeights
from rhc.errors import InputError
from rhc.report import why, write_page
from rhc.report.records import RunRecord, number
from rhc.report.text import final_table
from rhc.schedule import Schedule


@dataclass(frozen=True, repr=False)
class RunResult:
    """The result of a fit. record: the content of result.json; config: of config.json; starts: of
    start.jsonl."""

    schedule: Schedule
    record: dict[str, Any]
    tape: list[dict[str, Any]]
    windows: list[dict[str, Any]]
    directory: Path | None
    data_weights: DataWeights | None = None
    config: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def train_loss(self) -> float | None:
        return self.record["train_loss"]

    @property
    def val_loss(self) -> float | None:
        return self.record["val_loss"]

    @property
    def test_loss(self) -> float | None:
        return self.record["test_loss"]

    @property
    def test_accuracy(self) -> float | None:
        return self.record["test_accuracy"]

    @property
    def replay(self) -> dict[str, Any] | None:
        """How the first window replayed: `equal`, and else `first_step`, `what` differs there, by
        which share (`largest`), and the `operators` to blame. None where nothing was replayed."""
        return self.record.get("replay")

    @property
    def notices(self) -> list[str]:
        """What a person was told of the run, once each."""
        return self.record.get("notices", [])

    @property
    def passes(self) -> list[dict[str, Any]]:
        """Replays of the whole run, in order, as passes.jsonl has them."""
        return self.record.get("passes", [])

    @property
    def cost(self) -> dict[str, Any]:
        """The ledger: plain_run_equivalents, gradient_evaluations, hessian_products and others."""
        return self.record["cost"]

    # Looking at it -------------------------------------------------------------------------------

    def answers(self) -> dict[str, str]:
        """What a person asks of a run -> the sentence that answers it."""
        return {each.question: each.sentence for each in why.answers(self._run)}

    def report(self, output: str | Path | None = None) -> Path:
        """Writes the report.

        Args:
            output: a file; None for report.html in the run's directory, or here without one.

        Returns:
            Its path.

        Raises:
            InputError: where jinja2 is missing, or the file cannot be written.
        """
        return write_page([self._run], None if output is None else Path(output))

    def plot(self) -> Any:
        """A matplotlib figure of the losses and of what steered them, one axis of steps.

        Returns:
            The figure; a notebook shows it.

        Raises:
            InputError: where matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise InputError("plot needs matplotlib; pip install 'rhc[figures]'") from None
        run = self._run
        controls = [n for n in ("lr", "momentum", "noise", "weight_decay") if any(run.series(n)[1])]
        figure = Figure(figsize=(7, 2 + 1.3 * len(controls)), layout="constrained")
        axes = figure.subplots(
            1 + len(controls), 1, sharex=True, height_ratios=[2.0, *[1.0] * len(controls)]
        )
        axes = list(axes) if controls else [axes]
        for name, label in (("loss", "training"), ("val_loss", "validation")):
            if run.series(name)[0]:
                axes[0].plot(*run.series(name), label=label, linewidth=1)
        axes[0].set(ylabel="loss", yscale="log" if min(run.series("loss")[1]) > 0 else "linear")
        axes[0].legend()
        for axis, name in zip(axes[1:], controls, strict=True):
            axis.plot(*run.series(name), color="#b45309", linewidth=1)
            axis.set(ylabel=name)
        axes[-1].set(xlabel="step")
        return figure

    def to_pandas(self) -> Any:
        """A DataFrame with a row per committed step: loss, controls, metrics; InputError without
        pandas."""
        try:
            import pandas
        except ImportError:
            raise InputError("to_pandas needs pandas; pip install pandas") from None
        return pandas.DataFrame(self.tape).set_index("step")

    def __repr__(self) -> str:
        rows = [("", *(name for name, *_ in final_table(self.record)))]
        rows += [
            (label, *(row[i] for row in final_table(self.record)))
            for i, label in ((1, "final"), (2, "averaged"))
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([self._head, *lines])

    def _repr_html_(self) -> str:
        table = final_table(self.record)
        names = "".join(f"<th>{html.escape(name)}</th>" for name, *_ in table)
        rows = "".join(
            f"<tr><th>{label}</th>{''.join(f'<td>{row[i]}</td>' for row in table)}</tr>"
            for i, label in ((1, "final"), (2, "averaged"))
        )
        head = html.escape(why.headline(self._run))
        return f"<p>{head}</p><table><tr><th></th>{names}</tr>{rows}</table>"

    @property
    def _head(self) -> str:
        cost = number(self.cost.get("plain_run_equivalents")) or 0.0
        where = "" if self.directory is None else f", in {self.directory}"
        return f"RunResult: {self.record['steps']} steps for {cost:.2f} plain runs{where}"

    @property
    def _run(self) -> RunRecord:
        return RunRecord(
            self.directory or Path(),
            self.config,
            self.record,
            self.tape,
            self.windows,
            self.starts,
            passes=self.passes,
        )
