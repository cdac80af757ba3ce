"""Models, losses and hooks as people write them, of which a careless engine gets the wrong step.

A table: name -> what is hung on a model. Each in float64, deterministic, and made anew at every
call. `central` is the right hypergradient, by central differences of an ordinary torch loop.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = torch.float64
STEPS = 5

Batch = tuple[Tensor, Tensor]
Make = Callable[[Any], torch.optim.Optimizer]


class Hostile(NamedTuple):
    """model: makes one. batch: of a generator. hang: puts hooks on model and optimizer, if any.

    constants: something moves in training that hypergradients take for constants, and say so.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    hang: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda m, o: None
    constants: bool = False


class Made(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module, Any], Tensor]
    batches: list[Any]
    terminal: Callable[[nn.Module], Tensor]


OPTIMIZERS: Mapping[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def made(case: Hostile, optimizer: str = "sgd", steps: int = STEPS) -> Made:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = case.model().to(D)
    own = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    case.hang(model, own)
    generator = torch.Generator().manual_seed(1)
    batches = [case.batch(generator) for _ in range(steps)]
    held = case.batch(generator)
    torch.manual_seed(2)
    return Made(model, own, case.loss, batches, lambda m: case.loss(m, held))


def plain(case: Hostile, values: Mapping[str, Tensor], optimizer: str = "sgd") -> float:
    """J = Σ_t ℓ_t + the loss on a further batch, of an ordinary loop."""
    own = made(case, optimizer, len(next(iter(values.values()))))
    total = 0.0
    for t, batch in enumerate(own.batches):
        for group in own.optimizer.param_groups:
            for name, v in values.items():
                if name == "momentum" and "betas" in group:
                    group["betas"] = (float(v[t]), group["betas"][1])
                else:
                    group[name] = float(v[t])
        own.optimizer.zero_grad()
        loss = own.loss(own.model, batch)
        loss.backward()
        own.optimizer.step()
        total += float(loss.detach())
    return total + float(own.terminal(own.model).detach())


def central(case: Hostile, values: Mapping[str, Tensor], optimizer: str = "sgd") -> Tensor:
    """dJ/dlr by central differences of fourth order."""

    def at(t: int, shift: float) -> float:
        moved = dict(values, lr=values["lr"].clone())
        moved["lr"][t] += shift
        return plain(case, moved, optimizer)

    found = []
    for t, lr in enumerate(values["lr"].tolist()):
        h = 1e-3 * lr
        near, far = at(t, h) - at(t, -h), at(t, 2 * h) - at(t, -2 * h)
        found.append((8 * near - far) / (12 * h))
    return torch.tensor(found, dtype=D)


def rates(optimizer: str = "sgd", steps: int = STEPS) -> dict[str, Tensor]:
    lr = {"sgd": 0.1, "adamw": 0.01}[optimizer]
    return {"lr": lr * torch.linspace(0.85, 1.15, steps, dtype=D)}


# Parts -------------------------------------------------------------------------------------------


def rows(g: torch.Generator, n: int = 6) -> Batch:
    return torch.randn(n, 4, generator=g, dtype=D), torch.randint(0, 3, (n,), generator=g)


def more_rows(g: torch.Generator) -> Batch:
    """Of 3 to 8 rows."""
    return rows(g, 3 + int(torch.randint(0, 6, (), generator=g)))


def words(g: torch.Generator) -> Batch:
    return torch.randint(0, 9, (6,), generator=g), torch.randint(0, 3, (6,), generator=g)


def cross_entropy(m: nn.Module, b: Batch) -> Tensor:
    return F.cross_entropy(m(b[0]), b[1])


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


MASK = (torch.arange(6) >= 3).to(D)[:, None]


def on_first(hook: Callable[[Any], Any]) -> Callable[[nn.Module, Any], None]:
    """Hangs Tensor.register_hook(hook(parameter)) on the first weight."""

    def hang(model: nn.Module, optimizer: Any) -> None:
        p = next(model.parameters())
        p.register_hook(hook(p))

    return hang


def on_all(hook: Callable[[Tensor], Any]) -> Callable[[nn.Module, Any], None]:
    def hang(model: nn.Module, optimizer: Any) -> None:
        for p in model.parameters():
            p.register_hook(hook)

    return hang


# Hooks of parameters -----------------------------------------------------------------------------


def _in_place(g: Tensor) -> None:
    g.mul_(0.5)


def _without_grad(g: Tensor) -> Tensor:
    with torch.no_grad():
        return g * MASK


def _on_data(g: Tensor) -> None:
    g.data.mul_(MASK)


def _after(change: Callable[[Tensor], None]) -> Callable[[nn.Module, Any], None]:
    def hang(model: nn.Module, optimizer: Any) -> None:
        next(model.parameters()).register_post_accumulate_grad_hook(change)

    return hang


def _halve(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.mul_(0.5)


def _anew(p: Tensor) -> None:
    assert p.grad is not None
    p.grad = p.grad * MASK


def _forget(p: Tensor) -> None:
    p.grad = None


def _twice(model: nn.Module, optimizer: Any) -> None:
    p = next(model.parameters())
    p.register_hook(lambda g: g * MASK)
    p.register_hook(lambda g: g.clamp(-0.05, 0.05))


def _removed(model: nn.Module, optimizer: Any) -> None:
    next(model.parameters()).register_hook(lambda g: g * MASK).remove()


PARAMETER_HOOKS: Mapping[str, Hostile] = {
    name: Hostile(mlp, rows, cross_entropy, hang)
    for name, hang in {
        "a mask": on_first(lambda p: lambda g: g * MASK),
        "nothing": on_first(lambda p: lambda g: None),
        "zero": on_first(lambda p: lambda g: torch.zeros_like(g)),
        "a clamp": on_all(lambda g: g.clamp(-0.02, 0.02)),
        "its norm": on_all(lambda g: g / (1 + g.norm())),
        "centred": on_first(lambda p: lambda g: g - g.mean(1, keepdim=True)),
        "decay": on_first(lambda p: lambda g: g + 0.3 * p),
        "decay of a copy": on_first(lambda p: lambda g: g + 0.3 * p.detach()),
        "reversed": on_first(lambda p: lambda g: -g),
        "in place": on_all(_in_place),
        "without grad": on_first(lambda p: _without_grad),
        "on data": on_first(lambda p: _on_data),
        "two": _twice,
        "one that was removed": _removed,
        "halved afterwards": _after(_halve),
        "anew afterwards": _after(_anew),
        "forgotten afterwards": _after(_forget),
        "looked at afterwards": _after(lambda p: None),
    }.items()
}


# Hooks of optimizers -----------------------------------------------------------------------------


def before_step(change: Callable[[Any], None]) -> Callable[[nn.Module, Any], None]:
    return lambda model, optimizer: optimizer.register_step_pre_hook(lambda o, a, k: change(o))


def after_step(change: Callable[[Any], None]) -> Callable[[nn.Module, Any], None]:
    return lambda model, optimizer: optimizer.register_step_post_hook(lambda o, a, k: change(o))


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _scale(optimizer: Any) -> None:
    for p in _parameters(optimizer):
        p.grad.mul_(0.1)


def _clip(optimizer: Any) -> None:
    torch.nn.utils.clip_grad_norm_(_parameters(optimizer), 0.1)


@torch.no_grad()
def _box(optimizer: Any) -> None:
    for p in _parameters(optimizer):
        p.clamp_(-0.2, 0.2)


def _box_data(optimizer: Any) -> None:
    for p in _parameters(optimizer):
        p.data.clamp_(-0.2, 0.2)


STEP_HOOKS: Mapping[str, Hostile] = {
    name: Hostile(mlp, rows, cross_entropy, hang)
    for name, hang in {
        "scaled before": before_step(_scale),
        "clipped before": before_step(_clip),
        "looked at before": before_step(lambda o: None),
        "a box afterwards": after_step(_box),
        "a box of data afterwards": after_step(_box_data),
        "looked at afterwards": after_step(lambda o: None),
    }.items()
}


# Hooks of modules --------------------------------------------------------------------------------


def _scaled_output(model: nn.Module, optimizer: Any) -> None:
    model[0].register_forward_hook(lambda m, x, y: 1.5 * y)


def _scaled_input(model: nn.Module, optimizer: Any) -> None:
    model[0].register_forward_pre_hook(lambda m, x: (x[0] * 0.5,))


def _looked_back(model: nn.Module, optimizer: Any) -> None:
    model[2].register_full_backward_hook(lambda m, i, o: None)


def _scaled_back(model: nn.Module, optimizer: Any) -> None:
    model[2].register_full_backward_hook(lambda m, i, o: (0.5 * i[0],))


def _scaled_back_before(model: nn.Module, optimizer: Any) -> None:
    model[2].register_full_backward_pre_hook(lambda m, o: (0.5 * o[0],))


def _inside(m: Any, b: Batch) -> Tensor:
    hidden = m[0](b[0])
    hidden.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return F.cross_entropy(m[2](m[1](hidden)), b[1])


MODULE_HOOKS: Mapping[str, Hostile] = {
    **{
        name: Hostile(mlp, rows, cross_entropy, hang)
        for name, hang in {
            "output": _scaled_output,
            "input": _scaled_input,
            "looked at backwards": _looked_back,
            "backwards": _scaled_back,
            "backwards, before": _scaled_back_before,
        }.items()
    },
    "of a tensor inside": Hostile(mlp, rows, _inside),
}


# What occurs twice -------------------------------------------------------------------------------


def shared_module() -> nn.Module:
    p = nn.Linear(4, 4)
    return nn.Sequential(p, nn.Tanh(), p, nn.Tanh(), nn.Linear(4, 3))


def shared_norm() -> nn.Module:
    p, n = nn.Linear(4, 4), nn.BatchNorm1d(4)
    return nn.Sequential(p, n, nn.Tanh(), p, n, nn.Linear(4, 3))


def tied_weights() -> nn.Module:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(4, 3))


def tied_embedding() -> nn.Module:
    e, h = nn.Embedding(3, 5), nn.Linear(5, 3, bias=False)
    h.weight = e.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.h = e, h

        def forward(self, x: Tensor) -> Tensor:
            return self.h(torch.tanh(self.e(x % 3)))

    return Model()


def one_storage() -> nn.Module:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(4, 3)).to(D)
    b.weight = nn.Parameter(a.weight.data)
    return model


def one_flat_buffer() -> nn.Module:
    model = mlp().to(D)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    place = 0
    for p in model.parameters():
        p.data = flat[place : place + p.numel()].view_as(p)
        place += p.numel()
    return model


def shared_list() -> nn.Module:
    """One module in a list, in a dict and as an attribute."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
            self.again = self.layers[0]
            self.named = nn.ModuleDict({"x": self.layers[1]})
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (*self.layers, self.again, self.named["x"]):
                x = torch.tanh(layer(x))
            return self.head(x)

    return Model()


def shared_buffer() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            scale = torch.ones(6, dtype=D)
            self.a.register_buffer("scale", scale)
            self.b.register_buffer("scale", scale)

        def forward(self, x: Tensor) -> Tensor:
            self.a.scale.mul_(0.9)
            return self.b(torch.tanh(self.a(x) * self.b.scale))

    return Model()


TWICE: Mapping[str, Hostile] = {
    "a module": Hostile(shared_module, rows, cross_entropy),
    "a norm": Hostile(shared_norm, rows, cross_entropy),
    "a weight": Hostile(tied_weights, rows, cross_entropy),
    "an embedding": Hostile(tied_embedding, words, cross_entropy),
    "a storage": Hostile(one_storage, rows, cross_entropy),
    "one flat buffer": Hostile(one_flat_buffer, rows, cross_entropy),
    "modules in containers": Hostile(shared_list, rows, cross_entropy),
    "a buffer": Hostile(shared_buffer, rows, cross_entropy),
}


# Buffers -----------------------------------------------------------------------------------------


class WithState(nn.Module):
    """A small net whose hidden layer is scaled by `scale(x)`. start: registers what it needs."""

    def __init__(
        self,
        scale: Callable[[Any, Tensor], Any],
        start: Callable[[Any], None] = lambda m: None,
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        start(self)
        self.scaled = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) * self.scaled(self, x)))


def _filled(m: Any, x: Tensor) -> Tensor:
    if m.cos is None or len(m.cos) < len(x):
        m.cos = torch.cos(torch.arange(len(x), dtype=x.dtype))[:, None]
    return m.cos[: len(x)]


def _registered(m: Any, x: Tensor) -> Tensor:
    if not hasattr(m, "ramp"):
        m.register_buffer("ramp", torch.linspace(0.5, 1, 6, dtype=x.dtype), persistent=False)
    return m.ramp


def _expanded(m: Any) -> None:
    m.register_buffer("share", torch.full((1, 1), 0.5, dtype=D).expand(2, 6))


def _count(m: Any, x: Tensor) -> Tensor:
    m.seen += 1
    return 1 / m.seen


def _mean(m: Any, x: Tensor) -> Tensor:
    m.mean.lerp_(x.detach().mean(), 0.3)
    return 1 + m.mean


def _replaced(m: Any, x: Tensor) -> Tensor:
    m.mean = 0.7 * m.mean + 0.3 * x.detach().mean()
    return 1 + m.mean


def _history(m: Any, x: Tensor) -> Tensor:
    """Grows by one value at every step."""
    m.past = torch.cat([m.past, x.detach().mean()[None]])
    return 1 + m.past.mean()


def _dropped(m: Any, x: Tensor) -> Tensor:
    """Is None at every other step."""
    m.turn = None if m.turn is not None else torch.full((), 0.5, dtype=x.dtype)
    return torch.ones((), dtype=x.dtype) if m.turn is None else m.turn


BUFFERS: Mapping[str, Hostile] = {
    "filled": Hostile(
        lambda: WithState(_filled, lambda m: m.register_buffer("cos", None)),
        more_rows,
        cross_entropy,
    ),
    "registered in forward": Hostile(lambda: WithState(_registered), rows, cross_entropy),
    "expanded": Hostile(lambda: WithState(lambda m, x: m.share[0], _expanded), rows, cross_entropy),
    "counts": Hostile(
        lambda: WithState(_count, lambda m: m.register_buffer("seen", torch.tensor(0))),
        rows,
        cross_entropy,
    ),
    "a running mean": Hostile(
        lambda: WithState(_mean, lambda m: m.register_buffer("mean", torch.zeros((), dtype=D))),
        rows,
        cross_entropy,
    ),
    "replaced": Hostile(
        lambda: WithState(
            _replaced, lambda m: m.register_buffer("mean", torch.zeros((), dtype=D), False)
        ),
        rows,
        cross_entropy,
    ),
    "grows": Hostile(
        lambda: WithState(_history, lambda m: m.register_buffer("past", torch.zeros(1, dtype=D))),
        rows,
        cross_entropy,
    ),
    "comes and goes": Hostile(
        lambda: WithState(_dropped, lambda m: m.register_buffer("turn", None)), rows, cross_entropy
    ),
}


# Attributes --------------------------------------------------------------------------------------


def attribute(name: str, value: Callable[[], Any], scale: Callable[[Any, Tensor], Any]) -> Hostile:
    """A model that scales its hidden layer by what it makes of an attribute of its own."""
    return Hostile(
        lambda: WithState(scale, lambda m: setattr(m, name, value())), rows, cross_entropy
    )


def _counted(m: Any, x: Tensor) -> float:
    m.own += 1
    return float(1 / m.own)


def _annealed(m: Any, x: Tensor) -> float:
    m.own *= 0.9
    return float(m.own)


def _noted(m: Any, x: Tensor) -> float:
    m.own.append(float(x.mean()))
    return 1 + sum(m.own) / len(m.own)


def _by_key(m: Any, x: Tensor) -> float:
    m.own["n"] = m.own.get("n", 0) + 1
    return float(1 / m.own["n"])


def _centre(m: Any, x: Tensor) -> Tensor:
    m.own.mul_(0.9).add_(0.1 * x.detach().mean())
    return 1 + m.own


def _centre_anew(m: Any, x: Tensor) -> Tensor:
    m.own = 0.9 * m.own + 0.1 * x.detach().mean()
    return 1 + m.own


def _lazily(m: Any, x: Tensor) -> float:
    m.made = getattr(m, "made", 0) + 1
    return float(1 / m.made)


ATTRIBUTES: Mapping[str, Hostile] = {
    "a counter": attribute("own", lambda: 0, _counted),
    "an annealed number": attribute("own", lambda: 1.0, _annealed),
    "a list": attribute("own", list, _noted),
    "a deque": attribute("own", lambda: deque(maxlen=3), _noted),
    "a dict": attribute("own", dict, _by_key),
    "a tensor in place": attribute("own", lambda: torch.zeros((), dtype=D), _centre),
    "a tensor anew": attribute("own", lambda: torch.zeros((), dtype=D), _centre_anew),
    "one that forward makes": attribute("other", lambda: 0, _lazily),
    "torch's generator": attribute(
        "own",
        lambda: torch.Generator().manual_seed(3),
        lambda m, x: torch.rand(6, generator=m.own, dtype=x.dtype),
    ),
    "python's generator": attribute(
        "own", lambda: random.Random(3), lambda m, x: 0.5 + m.own.random()
    ),
    "numpy's generator": attribute(
        "own", lambda: np.random.default_rng(3), lambda m, x: 0.5 + float(m.own.random())
    ),
    "numpy's old generator": attribute(
        "own", lambda: np.random.RandomState(3), lambda m, x: 0.5 + float(m.own.rand())
    ),
    "the global generators": attribute(
        "own", lambda: 0, lambda m, x: 0.5 + random.random() + float(np.random.rand())
    ),
}


# Parameters that the loss moves ------------------------------------------------------------------


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.teacher = mlp(), mlp().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def teaching(move: Callable[[Tensor, Tensor], None]) -> Callable[[Any, Batch], Tensor]:
    def loss(m: Any, b: Batch) -> Tensor:
        with torch.no_grad():
            for p, q in zip(m.teacher.parameters(), m.net.parameters(), strict=True):
                move(p, q)
            target = m.teacher(b[0])
        own = m.net(b[0])
        return (own - target).square().mean() + 0.3 * F.cross_entropy(own, b[1])

    return loss


def _replace_data(p: Tensor, q: Tensor) -> None:
    p.data = 0.9 * p.data + 0.1 * q.data


def boxed(clamp: Callable[[Tensor], Any]) -> Callable[[Any, Batch], Tensor]:
    def loss(m: Any, b: Batch) -> Tensor:
        with torch.no_grad():
            for p in m.parameters():
                clamp(p)
        return cross_entropy(m, b)

    return loss


def max_norm() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 5, max_norm=1.0), nn.Tanh(), nn.Linear(5, 3))


def _boxed_by_hook(model: nn.Module, optimizer: Any) -> None:
    def clamp(module: Any, inputs: Any) -> None:
        module.weight.data.clamp_(-0.3, 0.3)

    model[2].register_forward_pre_hook(clamp)


MOVED: Mapping[str, Hostile] = {
    "a teacher": Hostile(Student, rows, teaching(lambda p, q: p.lerp_(q, 0.1)), constants=True),
    "a teacher's data": Hostile(
        Student, rows, teaching(lambda p, q: p.data.mul_(0.9).add_(0.1 * q.data)), constants=True
    ),
    "a teacher's data, replaced": Hostile(Student, rows, teaching(_replace_data), constants=True),
    "a box": Hostile(mlp, rows, boxed(lambda p: p.clamp_(-0.35, 0.35))),
    "a box of data": Hostile(mlp, rows, boxed(lambda p: p.data.clamp_(-0.35, 0.35))),
    "a largest norm": Hostile(max_norm, words, cross_entropy),
    "a box by a hook": Hostile(mlp, rows, cross_entropy, _boxed_by_hook),
}


KINDS: Mapping[str, Mapping[str, Hostile]] = {
    "parameter hooks": PARAMETER_HOOKS,
    "step hooks": STEP_HOOKS,
    "module hooks": MODULE_HOOKS,
    "twice": TWICE,
    "buffers": BUFFERS,
    "attributes": ATTRIBUTES,
    "moved": MOVED,
}

CASES: Mapping[str, Hostile] = {
    f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()
}

WAYS: Sequence[Mapping[str, Any]] = (
    {},
    {"memory_budget": 1},
    {"memory_budget": 1, "spill": False},
    {"product": "central-difference"},
    {"segment": 2, "product": "exact"},
    {"segment": STEPS, "product": "exact"},
)
"""Settings of rhc.hypergradient."""
