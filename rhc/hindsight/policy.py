"""Causal policies from features to control moves: model, files, fitting.

"laws" is AdaptiveRL's terms (and progress) with gains from ridge regression; "gru" is a small
recurrent network. Both return (Δlog α, Δlogit μ, Δlog σ) per update, within ± `LIMIT`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from rhc.errors import InputError
from rhc.hindsight.features import STEERED, Form
from rhc.storage.files import MOST_JSON_BYTES, parsed_json, read_regular, replace_durably

VERSION = 1
KINDS = ("gru", "laws")
LIMIT = math.log(1.25)
"""Largest move per update, in nats or logits."""
HIDDEN = 16
LEAST = 0.05
"""Smallest scale of a feature; near-constant ones must not be amplified."""
MARGIN = 0.25
"""Features may leave the training range by this share of it."""
_LARGEST_FILE = 16 * 2**20


class Network(nn.Module):
    """Features (R, U, F) of R runs at U updates -> moves (R, U, C); memory (1, R, H) -> memory."""

    mean: Tensor
    scale: Tensor

    def __init__(self, kind: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.linear = nn.Linear(inputs, outputs)
        if kind == "gru":
            self.memorise = nn.GRU(inputs, HIDDEN, batch_first=True)
            self.head = nn.Linear(HIDDEN, outputs, bias=False)

    def memory(self, rows: int) -> Tensor:
        return torch.zeros(1, rows, HIDDEN if self.kind == "gru" else 0)

    def forward(self, features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        z = (features - self.mean) / self.scale
        out = self.linear(z)
        if self.kind == "gru":
            seen, memory = self.memorise(z, memory)
            out = out + self.head(seen)
            return LIMIT * torch.tanh(out / LIMIT), memory
        return out.clamp(-LIMIT, LIMIT), memory


def _blank(kind: str, form: Form, seed: int = 0) -> Network:
    """An untrained network; preserves the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(kind, len(form.names), len(form.steered))


@dataclass(frozen=True)
class Policy:
    """every: steps per update. low, high: feature ranges with `MARGIN`. notes: provenance."""

    kind: str
    form: Form
    every: int
    network: Network
    low: Tensor
    high: Tensor
    notes: Mapping[str, Any] = field(default_factory=dict)

    def outside(self, features: Sequence[float]) -> str | None:
        """The name of a feature outside the training range, or None."""
        values = torch.tensor(features)
        beyond = (values < self.low) | (values > self.high) | ~values.isfinite()
        if not bool(beyond.any()):
            return None
        return self.form.names[int(beyond.nonzero()[0])]

    @torch.no_grad()
    def moves(self, features: Sequence[float], memory: Tensor) -> tuple[dict[str, float], Tensor]:
        """(control -> move in its coordinate, the next memory)."""
        out, memory = self.network(torch.tensor(features)[None, None], memory)
        return dict(zip(self.form.steered, out[0, 0].tolist(), strict=True)), memory

    # Files ---------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes policy.json and weights.safetensors, the JSON last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in self.network.state_dict().items()}
        data = save_tensors({**tensors, "low": self.low, "high": self.high})
        replace_durably(folder / "weights.safetensors", data)
        document = {
            "format": "rhc.policy",
            "version": VERSION,
            "kind": self.kind,
            "every": self.every,
            "steered": list(self.form.steered),
            "reward": self.form.reward,
            "gradient_norm": self.form.gradient_norm,
            "features": list(self.form.names),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "notes": dict(self.notes),
        }
        replace_durably(folder / "policy.json", (json.dumps(document, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> Policy:
        """Reads what `save` wrote; InputError for an invalid file."""
        folder = Path(folder)
        path, weights = folder / "policy.json", folder / "weights.safetensors"
        with _refused(path, "not JSON: "):
            document = parsed_json(read_regular(path.resolve(), MOST_JSON_BYTES))
        with _refused(path):
            if not isinstance(document, dict):
                raise TypeError(f"it holds {type(document).__name__}")
        if document.get("format") != "rhc.policy":
            raise InputError(f"{path} is no policy; give the folder that rhc distill -o wrote")
        if document.get("version") != VERSION:
            raise InputError(
                f"policy {folder} has version {document.get('version')!r}, this rhc reads version "
                f"{VERSION}; distil it again with this version"
            )
        with _refused(path):
            flags = document["reward"], document["gradient_norm"]
            form = Form(tuple(document["steered"]), *flags)
            kind, every, notes = document["kind"], document["every"], document.get("notes", {})
            known = kind in KINDS and isinstance(every, int) and every >= 1
            known = known and bool(form.steered) and set(form.steered) <= set(STEERED)
            known = known and all(isinstance(x, bool) for x in flags) and isinstance(notes, dict)
            if not known or list(form.names) != document["features"]:
                raise ValueError("its kind, controls or features are not this rhc's")
        with _refused(weights):
            data = read_regular(weights.resolve(), _LARGEST_FILE)
            if [len(data), hashlib.sha256(data).hexdigest()] != [
                document["bytes"],
                document["sha256"],
            ]:
                raise ValueError("it is not the file that policy.json was written with")
            tensors = load_tensors(data)
            network = _blank(kind, form)
            _check_tensors(tensors, network, len(form.names))
        low, high = tensors.pop("low"), tensors.pop("high")
        network.load_state_dict(tensors)
        network.requires_grad_(False)
        return cls(kind, form, every, network, low, high, notes)


@contextmanager
def _refused(path: Path, what: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot read policy {path.parent}: {path.name} cannot be read ({error.strerror}); "
            "give the folder that rhc distill -o wrote, or distil it again"
        ) from None
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({what}{error}); distil the policy again") from None


def _check_tensors(tensors: Mapping[str, Tensor], network: Network, features: int) -> None:
    expected = {name: t.shape for name, t in network.state_dict().items()}
    expected |= {name: torch.Size([features]) for name in ("low", "high")}
    for name in expected.keys() | tensors.keys():
        if name not in expected or name not in tensors:
            raise ValueError(f"{name} is {'too much' if name in tensors else 'missing'}")
        t = tensors[name]
        if t.shape != expected[name] or t.dtype != torch.float32:
            raise ValueError(f"{name} is {tuple(t.shape)} of {t.dtype}")
        if not bool(t.isfinite().all()):
            raise ValueError(f"{name} is not finite")


# Fitting ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """A run to imitate. features: (U, F); targets: (U, C) moves."""

    name: str
    features: Tensor
    targets: Tensor


def fitted(
    kind: str,
    form: Form,
    every: int,
    lessons: Sequence[Lesson],
    held_out: Sequence[Lesson] = (),
    *,
    epochs: int = 400,
    seed: int = 0,
    notes: Mapping[str, Any] | None = None,
) -> Policy:
    """The policy of this kind with the least mean square error to the lessons' moves. held_out:
    runs for early stopping of the gru; without any, its last epoch."""
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not lessons:
        raise InputError("there is nothing to learn from; give at least one run")
    network = _blank(kind, form, seed)
    everything = torch.cat([lesson.features for lesson in lessons])
    spread = everything.std(0, correction=0)
    network.mean.copy_(everything.mean(0))
    network.scale.copy_(spread.clamp(min=LEAST))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "laws":
            _fit_linear(network, lessons)
        else:
            _fit_recurrent(network, lessons, held_out, epochs)
    network.requires_grad_(False)
    width = everything.amax(0) - everything.amin(0)
    low, high = everything.amin(0) - MARGIN * width, everything.amax(0) + MARGIN * width
    low, high = low - 1e-4, high + 1e-4
    return Policy(kind, form, every, network.eval(), low, high, dict(notes or {}))


def error(policy: Policy, lessons: Sequence[Lesson]) -> float:
    """Mean square error of the moves relative to predicting no move."""
    off = still = 0.0
    with torch.no_grad():
        for lesson in lessons:
            out, _ = policy.network(lesson.features[None], policy.network.memory(1))
            off += float((out[0] - lesson.targets).square().sum())
            still += float(lesson.targets.square().sum())
    return off / still if still else math.nan


def _fit_linear(network: Network, lessons: Sequence[Lesson], ridge: float = 1e-2) -> None:
    z = torch.cat([(x.features - network.mean) / network.scale for x in lessons]).double()
    y = torch.cat([x.targets for x in lessons]).double()
    ones = torch.ones(len(z), 1, dtype=torch.float64)
    a = torch.cat([z, ones], 1)
    penalty = ridge * len(z) * torch.eye(a.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0
    w = torch.linalg.solve(a.T @ a + penalty, a.T @ y)
    with torch.no_grad():
        network.linear.weight.copy_(w[:-1].T)
        network.linear.bias.copy_(w[-1])


def _fit_recurrent(
    network: Network, lessons: Sequence[Lesson], held_out: Sequence[Lesson], epochs: int
) -> None:
    """Adam over whole runs, with noise on the features to cover unseen states."""
    _fit_linear(network, lessons)
    with torch.no_grad():
        network.head.weight.zero_()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, weight_decay=1e-5)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    train, test = _padded(lessons), _padded(held_out) if held_out else None
    best, kept = math.inf, {k: v.clone() for k, v in network.state_dict().items()}
    for epoch in range(epochs):
        loss = _loss(network, *train, noise=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay.step()
        if test is not None and epoch % 20 == 19:
            with torch.no_grad():
                value = float(_loss(network, *test))
            if value < best:
                best, kept = value, {k: v.clone() for k, v in network.state_dict().items()}
    if test is not None:
        network.load_state_dict(kept)


def _padded(lessons: Sequence[Lesson]) -> tuple[Tensor, Tensor, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    features = pad([x.features for x in lessons], batch_first=True)
    targets = pad([x.targets for x in lessons], batch_first=True)
    mask = pad([torch.ones(len(x.features)) for x in lessons], batch_first=True)
    return features, targets, mask


def _loss(
    network: Network, features: Tensor, targets: Tensor, mask: Tensor, noise: float = 0.0
) -> Tensor:
    if noise:
        features = features + noise * network.scale * torch.randn_like(features)
    out, _ = network(features, network.memory(len(features)))
    return ((out - targets).square().sum(-1) * mask).sum() / (mask.sum() * LIMIT**2)
