"""What reverse passes hold in memory, measured in processes of their own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from rhc.training import memory

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks can be reset on Linux only"
)

MEASUREMENT = """
import json, sys
import torch
from torch import nn
from torch.nn import functional as F

import rhc
from rhc.training import memory

options = json.loads(sys.argv[1])
steps, rows = options.pop("steps"), options.pop("rows")
torch.set_num_threads(1)
torch.manual_seed(0)
layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())]
model = nn.Sequential(*layers, nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
batch = torch.randn(rows, 64), torch.randint(10, (rows,))

def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])

def peak(function):
    memory.trim()
    memory.reset_peak(torch.device("cpu"))
    return function(), memory.current_peak(torch.device("cpu"))

def plain():
    for _ in range(5):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()

def look_back(steps):
    return rhc.hypergradient(
        model, optimizer, loss_fn, [batch] * steps, controls={"lr": 1e-3}, **options
    )

plain()
_, before = peak(plain)
found, during = peak(lambda: look_back(steps))
parameters = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({
    "bytes": during - before,
    "parameters": parameters,
    "graphs": found.plan.graphs,
    "spilled": found.plan.spilled,
    "chunk": found.plan.chunk,
    "pieces": found.plan.pieces,
    "fits": found.plan.fits,
    "predicted": found.plan.predicted_bytes,
}))
"""


def measured(**options: object) -> dict[str, int]:
    """Bytes of the peak beyond plain training, and what was planned; of 4 hidden layers of 64."""
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", MEASUREMENT, json.dumps(options)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


ROWS = 8192
"""A hidden layer's activations are 2 MiB, against 72 kB of parameters; a graph holds some 40 MB."""

NOISE = 16 * 2**20
"""Of resident memory: what the allocator keeps, and code that is loaded. Equal processes differ by
13 MB. A graph that stayed for every step would hold 7 GB."""


@pytest.mark.slow
@pytest.mark.parametrize("product", ["exact", "forward-difference"])
def test_memory_of_graphs_does_not_grow_with_the_window(product: str) -> None:
    """A gradient is kept for every step, and every √K-th state twice; nothing else may grow.

    From K = 100: before that the holes of the C heap fill up, by 20 to 30 MB whatever is held.
    """
    short, long = (
        sorted(
            (measured(steps=k, rows=ROWS, product=product) for _ in range(3)),
            key=lambda found: found["bytes"],
        )[1]
        for k in (100, 400)
    )
    assert short["graphs"] == long["graphs"] == 0
    stored = (400 - 100) * long["parameters"] + 2 * (20 - 10) * 3 * long["parameters"]
    assert long["bytes"] - short["bytes"] < stored + NOISE


@pytest.mark.slow
@pytest.mark.parametrize("spill", [True, False])
@pytest.mark.parametrize("budget", [120, 200, 400])
def test_a_roomy_budget_is_kept_to(budget: int, spill: bool) -> None:
    """Within a tenth, and it is made use of."""
    found = measured(
        steps=25, rows=ROWS, product="exact", memory_budget=budget * 10**6, spill=spill
    )
    assert found["fits"] and not found["spilled"] and not found["chunk"]
    assert found["bytes"] <= 1.1 * budget * 10**6
    assert found["graphs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("spill", [True, False])
def test_a_tight_budget_is_kept_to(spill: bool) -> None:
    """One whole product takes more than this: the rows are taken in parts."""
    found = measured(steps=25, rows=ROWS, product="exact", memory_budget=40 * 10**6, spill=spill)
    assert found["fits"] and found["pieces"] > 1
    assert found["bytes"] <= 1.1 * 40 * 10**6


@pytest.mark.slow
def test_what_is_predicted_is_what_is_held() -> None:
    """No less than half of it: a prediction far too high would make every plan too dear."""
    found = measured(steps=25, rows=ROWS, product="exact", memory_budget=300 * 10**6)
    assert 0.5 * found["predicted"] <= found["bytes"] <= 1.1 * found["predicted"]


def test_a_ceiling_trims_as_rarely_as_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every step, also where holes are not what is too much."""
    there, trims = 100, 0

    def trim() -> None:
        nonlocal there, trims
        there, trims = min(there, least), trims + 1

    monkeypatch.setattr(memory.Ceiling, "ground", None)
    monkeypatch.setattr(memory, "trim", trim)
    monkeypatch.setattr(memory, "resident", lambda: there)
    least = 80
    ceiling = memory.Ceiling(160)  # the ground is 80, the height 240
    there = 240
    ceiling.check()
    assert trims == 1
    there = 241
    ceiling.check()
    assert trims == 2
    there, least = 300, 260
    for _ in range(5):
        ceiling.check()
    assert (trims, there) == (3, 260)
    there, least = 400, 90
    ceiling = memory.Ceiling(160)  # a new window, the heap full of holes
    assert (trims, ceiling.limit) == (4, 250)
    there = 240
    other = memory.Ceiling(150)  # as when a hypergradient is asked for again
    assert (trims, other.limit) == (4, 240)
    there, least = 330, 300
    assert memory.Ceiling(150, spare=90).limit == 240  # what was held before is no reason
    assert trims == 4
    memory.Ceiling(150, spare=89)
    assert (trims, memory.Ceiling.ground) == (5, 300)


def test_a_ceiling_makes_room_once_for_what_is_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    there, trims = 100, 0

    def trim() -> None:
        nonlocal there, trims
        there, trims = 80, trims + 1

    monkeypatch.setattr(memory.Ceiling, "ground", 80)
    monkeypatch.setattr(memory, "trim", trim)
    monkeypatch.setattr(memory, "resident", lambda: there)
    ceiling = memory.Ceiling(160, work=100)
    there = 140
    ceiling.make_room()
    assert trims == 0
    there = 141
    ceiling.make_room()
    assert (trims, there, ceiling.limit) == (1, 80, 240)


def test_a_heap_is_trimmed_where_it_grows_beyond_its_height(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside graphs that stay: one as high that does not grow is used, window after window."""
    there, trims = 0, 0

    def trim() -> None:
        nonlocal there, trims
        there, trims = least, trims + 1

    monkeypatch.setattr(memory.Ceiling, "ground", 0)
    monkeypatch.setattr(memory, "trim", trim)
    monkeypatch.setattr(memory, "resident", lambda: there)
    step = 4 * memory.GROWTH
    ceiling = memory.Ceiling(10 * step)
    for n in range(1, 11):
        there = n * step
        ceiling.check_growth()
    assert trims == 0
    least, there = 8 * step, 11 * step
    ceiling.check_growth()
    assert (trims, there) == (1, 8 * step)
    there = 10 * step + 1  # grows again, after a trim from lower down
    ceiling.check_growth()
    assert trims == 2
    there = 12 * step
    ceiling = memory.Ceiling(10 * step, spare=5 * step)  # the next window's
    for _ in range(5):
        ceiling.check_growth()
    assert trims == 2
    ceiling = memory.Ceiling(10 * step, work=4 * step, spare=5 * step)
    for more in (1, 2):
        there = 12 * step + more * step
        ceiling.check_growth()
    assert trims == 2, "a quarter of a graph is no graph"
    there += step + 1
    ceiling.check_growth()
    assert trims == 3


HELD = """
import ctypes, json, resource
from rhc.training import memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def faults(at_once=1):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [libc.malloc(24 * 2**20) for _ in range(at_once)]
        for block in blocks:
            ctypes.memset(block, 1, 24 * 2**20)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
with memory.held(2**27) as held, memory.held():
    inside = faults()
print(json.dumps([before, held, inside, faults(3)]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap")
def test_freed_memory_stays_for_the_next_step() -> None:
    """Inside `held`: what is free is not faulted in again and again."""
    environment = {k: v for k, v in os.environ.items() if k not in memory.TUNED}
    done = subprocess.run(
        [sys.executable, "-c", HELD], capture_output=True, text=True, env=environment, check=True
    )
    before, held, inside, after = json.loads(done.stdout)
    page = os.sysconf("SC_PAGESIZE")
    assert held
    assert before > 20 * 2**20 / page
    assert inside < 2 * 24 * 2**20 / page
    assert after > 20 * 3 * 2**20 / page


@pytest.mark.parametrize("name", memory.TUNED)
def test_a_heap_that_its_user_has_tuned_is_left_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_libc", lambda: pytest.fail("the heap was asked for"))
    monkeypatch.setenv(name, "1")
    with memory.held() as held:
        assert not held
