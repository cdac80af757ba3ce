"""Time and memory of looking back, against plain training: one process per measurement.

    python benchmarks/hypergradient.py --model gpt --optimizer sgd --steps 25

Prints, per mode, the time of roll + reverse pass in plain steps per step (median of the rounds,
which interleave the modes), and the peak resident memory above plain training's; writes JSON with
-o. A mode is `plain`, `higher`, or `SEGMENT/PRODUCT` of rhc's adjoint.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

MODES = ("plain", "1/exact", "1/forward-difference", "root/exact", "all/exact", "higher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt", help="gpt, mlp, cnn or lstm")
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adam", "adamw"))
    parser.add_argument("--steps", type=int, default=25, help="window length K")
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in arguments.modes}
    for _ in range(arguments.rounds):
        for mode in arguments.modes:
            found[mode].append(in_process(mode, arguments))
    plain = found["plain"]
    seconds = statistics.median(r["seconds"] for r in plain)
    memory = statistics.median(r["peak_bytes"] for r in plain)
    rows = [
        {
            "mode": mode,
            "plain_steps_per_step": statistics.median(r["seconds"] for r in rounds) / seconds,
            "megabytes_above_plain": (statistics.median(r["peak_bytes"] for r in rounds) - memory)
            / 1e6,
        }
        for mode, rounds in found.items()
    ]
    print(
        f"{arguments.model}, {arguments.optimizer}, K={arguments.steps}, plain step "
        f"{1e3 * seconds / arguments.steps:.1f} ms, {platform.machine()}, 1 thread"
    )
    for row in rows:
        print(
            f"{row['mode']:>24}  {row['plain_steps_per_step']:6.2f} plain steps  "
            f"{row['megabytes_above_plain']:8.0f} MB above plain"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps({"rows": rows, "rounds": found}, indent=1) + "\n")


def in_process(mode: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", mode, "--model", arguments.model]
    command += ["--optimizer", arguments.optimizer, "--steps", str(arguments.steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    import higher  # noqa: F401  importing is not what is measured
    import torch
    from models import CASES

    import rhc.hypergradient.segments  # noqa: F401

    torch.set_num_threads(1)
    torch.manual_seed(0)
    make_model, loss_fn, make_batch = CASES[arguments.model]
    model = make_model()
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, 1e-3),
        "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    }[arguments.optimizer](model.parameters())
    batches = [make_batch() for _ in range(arguments.steps)]

    def plain(n: int) -> None:
        for batch in batches[:n]:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()

    plain(3)
    run: Callable[[], object] = lambda: plain(arguments.steps)  # noqa: E731
    if arguments.measure != "plain":
        looking_back(arguments, model, optimizer, loss_fn, batches[:2])()
        run = looking_back(arguments, model, optimizer, loss_fn, batches)
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def looking_back(arguments, model, optimizer, loss_fn, batches):  # type: ignore[no-untyped-def]
    import rhc

    steps = len(batches)
    controls = {"lr": optimizer.param_groups[0]["lr"], "momentum": 0.9}
    if arguments.measure == "higher":
        options = {"engine": "higher"}
    else:
        segment, product = arguments.measure.split("/")
        length = {"root": round(steps**0.5), "all": steps}
        options = {"segment": length.get(segment) or int(segment), "product": product}
    return lambda: rhc.hypergradient(
        model, optimizer, loss_fn, batches, controls=controls, **options
    )


if __name__ == "__main__":
    main()
