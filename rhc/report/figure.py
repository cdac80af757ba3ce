"""Figures of plotly.js as data: words, traces, settings of axes."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INK = ("#0b5fa5", "#b45309", "#117733", "#9b2d77", "#5b5b00", "#374151", "#a61c1c", "#0f6674")
"""Contrast with white: at least 4.5 to 1."""
NIGHT = {
    **dict(zip(INK, ("#7cc0f5", "#f0a35c", "#5fd38d", "#e58bc5", "#d0cf62", "#cbd5e1", "#f28b82",
                     "#5cc8d8"), strict=True)),
    "#9db4c8": "#52708c", "#e5e7eb": "#374151", "#6b7280": "#9ca3af", "#1f2937": "#e5e7eb",
    "#ffffff": "#111827",
}  # fmt: skip
"""Ink -> its colour on a dark page, with a contrast of at least 4.5 to 1."""
PALE, GREY = "#9db4c8", "#6b7280"
MOST_CURVES = 24
"""A legend of more is left out."""

Points = tuple[Sequence[float | None], Sequence[float | None]]
Trace = dict[str, Any]


@dataclass
class Chart:
    key: str
    title: str
    caption: str
    traces: list[Trace]
    y: str = ""
    """Axis title, as x."""
    x: str = "step"
    log: str = ""
    """Axes that are logarithmic where all their values are positive: "y", "xy"."""
    says: str = ""
    """Text alternative, where that of the traces does not say it."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Further settings, by axis."""
    place: int = 0
    """Among charts that stand side by side, from 1; 0 for others."""

    def __post_init__(self) -> None:
        self.traces = [trace for trace in self.traces if len(trace["x"])]

    @property
    def alternative(self) -> str:
        drawn = [trace for trace in self.traces if "hoverinfo" not in trace]
        return f"{self.title}. {self.says or '; '.join(map(_told, drawn[:12]))}."

    @property
    def figure(self) -> dict[str, Any]:
        own: dict[str, dict[str, Any]] = {
            "xaxis": {"title": {"text": self.x}, "type": self._scale("x")},
            "yaxis": {"title": {"text": self.y}, "type": self._scale("y")},
        }
        axes = {name: own.get(name, {}) | self.layout.get(name, {}) for name in own | self.layout}
        legend = sum(trace.get("showlegend", True) for trace in self.traces)
        layout = {
            "margin": {"l": 48, "r": 12, "t": 12, "b": 44},
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1f2937"},
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
            "showlegend": 1 < legend <= MOST_CURVES,
            "hovermode": "closest",
            "barmode": "stack",
            **{name: AXIS | settings for name, settings in axes.items()},
        }
        return {"data": _safe(self.traces), "layout": _safe(layout)}

    def _scale(self, axis: str) -> str:
        values = (v for trace in self.traces if "yaxis" not in trace for v in trace[axis])
        positive = axis in self.log and all(v is not None and v > 0 for v in values)
        return "log" if positive else "-"


AXIS = {"automargin": True, "gridcolor": "#e5e7eb", "linecolor": GREY, "zeroline": False}
RIGHT = {"overlaying": "y", "side": "right", "showgrid": False, "tickmode": "auto"}


def line(points: Points, name: str, ink: str, *, width: int = 2, **style: Any) -> Trace:
    """A curve; None interrupts it. style: of plotly's line."""
    return _scatter("lines", points, name, line={"color": ink, "width": width, **style})


def marks(points: Any, name: str, ink: str, symbol: str = "circle", **style: Any) -> Trace:
    """A mark per point. style: of plotly's marker."""
    marker = {"color": ink, "symbol": symbol, "size": 8, **style}
    return _scatter("markers", points, name, marker=marker)


def area(points: Points, name: str, ink: str, opacity: float = 0.25) -> Trace:
    """Filled polygons, divided by None."""
    red, green, blue = (int(ink[at : at + 2], 16) for at in (1, 3, 5))
    filled = {"fill": "toself", "fillcolor": f"rgba({red},{green},{blue},{opacity})"}
    return line(points, name, ink, width=0) | filled | {"hoverinfo": "skip"}


def _scatter(mode: str, points: Points, name: str, **style: Any) -> Trace:
    x, y = points
    return {"type": "scatter", "mode": mode, "x": list(x), "y": list(y), "name": name, **style}


def _told(trace: Trace) -> str:
    """What a trace shows, in words."""
    name, values = trace["name"], [v for v in trace["y"] if v is not None]
    if trace["mode"] == "lines":
        return (
            f"{name} from {values[0]:.4g} to {values[-1]:.4g}, between {min(values):.4g} and "
            f"{max(values):.4g}"
        )
    return f"{name} {values[0]:.4g}" if len(values) == 1 else f"{len(values)} marks: {name}"


def _safe(value: Any) -> Any:
    """The value with text escaped, which plotly.js would take for markup, and six digits."""
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _safe(each) for name, each in value.items()}
    return [_safe(each) for each in value] if isinstance(value, list | tuple) else value
