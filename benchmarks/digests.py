"""Digests of short runs of everything: what a change that must not move numbers is held against.

    git worktree add /tmp/before REV
    PYTHONPATH=/tmp/before python benchmarks/digests.py before.json
    python benchmarks/digests.py after.json --against before.json

Every case leaves files; of each its digest is kept, without what differs between two equal runs
(seconds, bytes, paths, the text of the code). Hypergradients are kept as numbers, in float64, and
compared to 1e-10. Bits differ between processors: both sides are made on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("RHC_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

DIFFERS = (
    "seconds", "bytes", "directory", "path", "code", "versions", "hardware", "created", "data",
    "written_by", "source", "rhc", "time", "files", "command", "chosen_start", "skipped",
)  # fmt: skip
"""Parts of the names of keys whose values differ between two equal runs."""

SHORT = "--steps 30 --window 10 --seed 3"

CASES: dict[str, str] = {
    **{
        name: f"train {name} {SHORT} --directory run"
        for name in (
            "digits", "sine", "drifting_sine", "ill_scaled", "mnist", "mnist_cnn",
            "shifting_mnist", "char_lm", "cartpole",
        )
    },
    "cartpole_ppo": f"train cartpole_ppo {SHORT} --no-rewrite --directory run",
    "given": f"train digits {SHORT} --start given --lr 0.05 --stride 5 "
    "--controls lr momentum noise weight_decay --per-group lr --weight-decay 0.001 --directory run",
    "exact": f"train digits {SHORT} --product exact --optimizer adamw --lr 0.01 --directory run",
    "forward": f"train digits {SHORT} --product forward-difference --start given "
    "--optimizer nadam --discount 0.95 --costate-clip 2 --directory run",
    "reverse": f"train digits {SHORT} --product central-difference --accumulate 2 --clip-norm 1 "
    "--optimizer rmsprop --start probe --directory run",
    "segment": f"train sine {SHORT} --segment 5 --start given --directory run",
    "budget": f"train mnist {SHORT} --memory-budget 3MB --product exact --directory run",
    "plain": f"train sine {SHORT} --no-rewrite --start zero --template 1cycle --directory run",
    "values": f"train sine {SHORT} --clip-value 0.1 --optimizer adagrad --validate-every 7 "
    "--template linear --warmup 0.2 --directory run",
    "replay": f"train digits {SHORT} --directory run ; replay run --seed 4 --directory again",
    "resume": "train digits --steps 20 --window 10 --directory run ; resume run",
    "smooth": "smooth sine --steps 60 --seed 3 --passes 2 --directory run",
    "hypergradient": f"train digits {SHORT} --lr 0.05 --directory run ; hypergradient run ; "
    "hypergradient run --passes 1 --output again",
    "distill": f"train digits {SHORT} --directory one ; train digits {SHORT} --seed 4 --directory "
    "two ; distill one two -o policy --kind laws --rounds 1",
    "gru": f"train digits {SHORT} --directory one ; distill one -o policy --rounds 0",
    "compare": "compare digits --methods rhc adaptive constant cosine --seeds 1 --steps 30 "
    "--output run",
    "ranks": f"torchrun train digits {SHORT} --directory run",
}  # fmt: skip

PROGRAMS = {
    "twins": """
from rhc.loop.update_rule import Twin
run(rewrite=Twin(), start="given", template="constant", window=10, directory="run").fit(steps=30)
""",
    "planner": """
run(rewrite=False, planner=rhc.EpochPlanner(), directory="run").fit(steps=90)
""",
    "causal": """
rows = []
scheduler = rhc.AdaptiveRL(optimizer)
while len(rows) < 120:
    for batch in w.train_loader:
        optimizer.zero_grad()
        out = w.loss_fn(w.model, batch)
        loss = out[0] if isinstance(out, tuple) else out
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
        rows.append([float(loss), optimizer.param_groups[0]["lr"]])
open("rows.json", "w").write(json.dumps(rows))
""",
    "numbers": """
import torch
from torch import nn
from torch.nn import functional as F
torch.set_default_dtype(torch.float64)
found = {}
models = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4),
                                  nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
    "lstm": lambda: Last(nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)),
    "attention": lambda: Last(
        nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, 3)),
}
class Last(nn.Module):
    def __init__(self, inner, head):
        super().__init__()
        self.inner, self.head = inner, head
    def forward(self, x):
        y = self.inner(torch.stack([x, x.flip(1), 2 * x], 1))
        return self.head((y[0] if isinstance(y, tuple) else y)[:, -1])
def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])
optimizers = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}
for model_name, model in models.items():
    for name, optimizer in optimizers.items():
        settings = [dict(product="exact")]
        if model_name == "mlp":
            settings += [dict(product=p) for p in ("none", "forward-difference",
                         "central-difference")]
            settings += [dict(product="exact", segment=3),
                         dict(product="exact", memory_budget=4000),
                         dict(product="exact", clip_norm=0.3),
                         dict(average=0.5, discount=0.9, costate_clip=2.0)]
        if name in ("nadam", "radam", "adamax", "rmsprop", "adagrad", "nesterov"):
            settings = settings[:2]
        for setting in settings:
            torch.manual_seed(0)
            m = model()
            o = optimizer(m.parameters())
            batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(8)]
            held = (torch.randn(8, 6), torch.randint(3, (8,)))
            lr = torch.full((8,), o.param_groups[0]["lr"])
            h = rhc.hypergradient(
                m, o, loss_fn, batches, controls={"lr": lr, "noise": torch.full((8,), 0.1)},
                terminal=lambda mm: loss_fn(mm, held), verify=False, **setting)
            values = [v for n in sorted(h.grad) for v in h.grad[n].flatten().tolist()]
            found[f"{model_name} {name} {setting}"] = [float(h.value), *values]
open("numbers.json", "w").write(json.dumps(found))
""",
}

PREAMBLE = """
import json, sys
import torch
import rhc
torch.set_num_threads(1)
from runners.digits import digits
import random, numpy
random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
w = digits(seed=1)
optimizer = torch.optim.SGD(w.model.parameters(), lr=0.05, momentum=0.9)
def run(**settings):
    return rhc.Runner(w.model, optimizer, w.loss_fn, w.train_loader, w.val_loader,
                      test_loader=w.test_loader, **settings)
"""


def commands(name: str) -> Iterator[list[str]]:
    """The command lines of a case."""
    if name in PROGRAMS:
        yield [sys.executable, "-c", PREAMBLE + PROGRAMS[name]]
        return
    for line in CASES[name].split(" ; "):
        words = line.split()
        if words[0] == "torchrun":
            ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
            yield [sys.executable, "-m", *ranks, "rhc", "--", *words[1:]]
        else:
            yield [sys.executable, "-m", "rhc", *words]


def left(name: str) -> dict[str, Any]:
    """Runs a case in a folder of its own; digests of what it leaves, by file."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"RHC_DATA": str(DATA), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
        for command in commands(name):
            if command[-1] != PROGRAMS.get(name) and command[3:4] and "train" in command:
                data = {"char_lm": "tinyshakespeare"}.get(name, "mnist")
                if any(
                    word in command
                    for word in ("char_lm", "mnist", "mnist_cnn", "ill_scaled", "shifting_mnist")
                ):
                    command += ["--data", str(DATA / data)]
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                return {"failed": (done.stdout + done.stderr)[-2000:]}
        root = Path(folder)
        found = {
            str(path.relative_to(root)): digest(path)
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.suffix in (".json", ".jsonl", ".safetensors", ".csv")
            and path.name not in ("manifest.json", "config.json", "runs.json")
        }  # fmt: skip
    return found


def digest(path: Path) -> Any:
    """Of a file's content, as far as two equal runs share it; numbers.json as it is."""
    if path.name == "numbers.json":
        return json.loads(path.read_text())
    if path.suffix == ".safetensors":
        content = path.read_bytes()
    else:
        text = path.read_text()
        values = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else (
            json.loads(text) if path.suffix == ".json" else text
        )  # fmt: skip
        content = json.dumps(same(values), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def same(value: Any) -> Any:
    """The value without what differs between two equal runs."""
    if isinstance(value, dict):
        return {
            key: same(item)
            for key, item in value.items()
            if not any(part in key for part in DIFFERS)
        }
    return [same(item) for item in value] if isinstance(value, list) else value


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What differs between two sets of digests, in lines."""
    for name, files in before.items():
        if name not in after:
            continue
        for file in sorted({*files, *after[name]}):
            old, new = files.get(file), after[name].get(file)
            if isinstance(old, dict) and isinstance(new, dict):
                for key in sorted({*old, *new}):
                    far = apart(old.get(key, []), new.get(key, []))
                    if far > 1e-10:
                        yield f"{name}: {key}: {far:.2g}"
            elif old != new or file == "failed":
                yield f"{name}: {file}: {old} -> {new}"


def apart(old: list[float], new: list[float]) -> float:
    """Largest difference, relative to the largest value."""
    if len(old) != len(new):
        return float("inf")
    size = max([abs(value) for value in old], default=0.0) or 1.0
    return max((abs(a - b) for a, b in zip(old, new, strict=True)), default=0.0) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--cases", nargs="*", default=[*CASES, *PROGRAMS])
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    with ThreadPoolExecutor(asked.workers) as pool:
        found = dict(zip(asked.cases, pool.map(left, asked.cases), strict=True))
    asked.output.write_text(json.dumps(found, indent=1) + "\n")
    for name, files in found.items():
        if "failed" in files:
            print(f"{name} failed: {files['failed']}")
    if asked.against is not None:
        lines = list(differences(json.loads(asked.against.read_text()), found))
        print("\n".join(lines) if lines else f"identical: {len(found)} cases")
        sys.exit(bool(lines))


if __name__ == "__main__":
    main()
