"""Losses that keep something from autograd, as people write them.

`LOSSES` is a table: name -> model, batch and loss. In each, a step's gradient is not the whole
derivative of the loss, or its second derivative is not what autograd makes of it. In float64 all
are smooth where they are evaluated, so that central differences of a plain loop are the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function, grad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

D = torch.float64
Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Any], Tensor]


class Hostile(NamedTuple):
    """numbers: the loss reads a value as a Python number, which nothing can look through."""

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Loss
    numbers: bool = False


def rows(draw: torch.Generator, n: int = 6) -> Batch:
    """(n, 4) inputs, classes of 3, (n, 4) other inputs."""
    x, other = (torch.randn(n, 4, generator=draw, dtype=D) for _ in range(2))
    return x, torch.randint(0, 3, (n,), generator=draw), other


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def _ce(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


# Detached ----------------------------------------------------------------------------------------


def focal(model: nn.Module, batch: Batch) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return ((1 - torch.exp(-losses)).detach() * losses).mean()


def normalised_focal(model: nn.Module, batch: Batch) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    with torch.no_grad():
        weights = (1 - torch.exp(-losses)) ** 2
        weights = weights / weights.sum()
    return (weights * losses).sum()


def td(model: nn.Module, batch: Batch) -> Tensor:
    value, after = model(batch[0])[:, 0], model(batch[2])[:, 1]
    return (value - (batch[1].to(D) + 0.9 * after).detach()).square().mean()


def td_no_grad(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        target = batch[1].to(D) + 0.9 * model(batch[2]).logsumexp(1)
    return F.smooth_l1_loss(model(batch[0])[:, 0], target)


def td_inference(model: nn.Module, batch: Batch) -> Tensor:
    with torch.inference_mode():
        after = torch.zeros(len(batch[0]), dtype=D) + model(batch[2])[:, 1]
    return (model(batch[0])[:, 0] - 0.9 * after).square().mean()


@torch.no_grad()
def _sinkhorn(scores: Tensor) -> Tensor:
    q = torch.exp(scores / 0.5)
    for _ in range(3):
        q /= q.sum(0, keepdim=True)
        q /= q.sum(1, keepdim=True)
    return q


def swav(model: nn.Module, batch: Batch) -> Tensor:
    a, b = model(batch[0]), model(batch[2])
    p, q = _sinkhorn(a), _sinkhorn(b)
    return -(q * F.log_softmax(a, 1) + p * F.log_softmax(b, 1)).sum(1).mean()


def simsiam(model: Any, batch: Batch) -> Tensor:
    first, second = model[0](batch[0]).tanh(), model[0](batch[2]).tanh()
    p = model[2](first), model[2](second)
    z = first[:, :3].detach(), second[:, :3].detach()
    return -(F.cosine_similarity(p[0], z[1]).mean() + F.cosine_similarity(p[1], z[0]).mean()) / 2


def actor_critic(model: nn.Module, batch: Batch) -> Tensor:
    out = model(batch[0])
    value, log_p = out[:, 0], F.log_softmax(out[:, 1:], 1)
    returns = batch[2][:, 0]
    advantage = (returns - value).detach()
    actor = -(advantage * log_p.gather(1, (batch[1] % 2)[:, None])[:, 0]).mean()
    return actor + 0.5 * (returns - value).square().mean()


def ppo(model: nn.Module, batch: Batch) -> Tensor:
    log_p = F.log_softmax(model(batch[0]), 1).gather(1, batch[1][:, None])[:, 0]
    ratio = torch.exp(log_p - log_p.detach())
    reward = batch[2][:, 0]
    return -(ratio * (reward - reward.mean())).mean() + 0.1 * model(batch[2]).square().mean()


def reinforce(model: nn.Module, batch: Batch) -> Tensor:
    log_p = F.log_softmax(model(batch[0]), 1)
    chosen = log_p.gather(1, batch[1][:, None])[:, 0]
    reward = log_p.data.exp()[:, 0]
    return -((reward - reward.mean()) * chosen).mean() + 0.1 * log_p.square().mean()


def standardised(model: nn.Module, batch: Batch) -> Tensor:
    y = model(batch[0])
    y = (y - y.mean(0).detach()) / y.std(0).detach()
    return F.cross_entropy(y, batch[1])


def balanced_terms(model: nn.Module, batch: Batch) -> Tensor:
    first, second = _ce(model, batch), model(batch[2]).square().mean()
    return first + second * (first.detach() / second.detach())


def vq(model: Any, batch: Batch) -> Tensor:
    z = model[0](batch[0])
    code = model[2].weight[batch[1] % 3]
    commit = F.mse_loss(z, code.detach()) + F.mse_loss(code, z.detach())
    return F.cross_entropy(model[2](z + (code - z).detach()), batch[1]) + 0.25 * commit


def surrogate(model: Any, batch: Batch) -> Tensor:
    h = model[0](batch[0])
    h = h + (torch.tanh(3 * h) - h).detach()
    return F.cross_entropy(model[2](h), batch[1])


def cosine_head(model: Any, batch: Batch) -> Tensor:
    h = model[0](batch[0]).tanh()
    w = model[2].weight / model[2].weight.data.norm(dim=1, keepdim=True)
    return F.cross_entropy(5 * F.linear(h, w), batch[1])


def power_iteration(model: Any, batch: Batch) -> Tensor:
    w = model[0].weight
    with torch.no_grad():
        v = torch.ones(4, dtype=D)
        for _ in range(3):
            u = F.normalize(w @ v, dim=0)
            v = F.normalize(w.t() @ u, dim=0)
    return _ce(model, batch) + 0.1 * (u @ w @ v).square()


def checkpointed(model: Any, batch: Batch) -> Tensor:
    h = checkpoint(model[:2], batch[0], use_reentrant=False)
    scale = h.square().mean().sqrt().detach()
    return F.cross_entropy(model[2](h / scale), batch[1])


def adversarial(model: nn.Module, batch: Batch) -> Tensor:
    """Virtual adversarial training: the direction comes from a gradient without a graph."""
    x = batch[0].detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(_ce(model, (x, batch[1])), x)
    return _ce(model, batch) + _ce(model, (batch[0] + 0.3 * F.normalize(g, dim=1), batch[1]))


def first_order_maml(model: nn.Module, batch: Batch) -> Tensor:
    names, values = zip(*model.named_parameters(), strict=True)
    found = grad(_ce(model, batch), values)
    moved = {n: p - 0.3 * g for n, p, g in zip(names, values, found, strict=True)}
    return F.cross_entropy(torch.func.functional_call(model, moved, (batch[2],)), batch[1])


# Harmless ----------------------------------------------------------------------------------------


def detached_maximum(model: nn.Module, batch: Batch) -> Tensor:
    y = model(batch[0])
    top = y.max(1, keepdim=True).values.detach()
    log_z = (y - top).exp().sum(1).log() + top[:, 0]
    return (log_z - y.gather(1, batch[1][:, None])[:, 0]).mean()


def pseudo_labels(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        labels = model(batch[2]).argmax(1)
    return _ce(model, batch) + 0.1 * F.cross_entropy(model(batch[2]), labels)


def with_metrics(model: nn.Module, batch: Batch) -> Any:
    y = model(batch[0])
    loss = F.cross_entropy(y, batch[1])
    with torch.no_grad():
        accuracy = (y.argmax(1) == batch[1]).to(D).mean()
    return loss, {"accuracy": accuracy, "loss": loss.detach(), "norm": y.detach().numpy().max()}


def hard_mining(model: nn.Module, batch: Batch) -> Tensor:
    a, b = model(batch[0]), model(batch[2])
    with torch.no_grad():
        furthest = torch.cdist(a, b).argmax(1)
    return (a - b[furthest]).square().sum(1).mean() + 0.1 * _ce(model, batch)


# Not the derivative of the forward ----------------------------------------------------------------


class Reversal(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * g, None


reverse = Reversal.apply


def gradient_reversal(model: Any, batch: Batch) -> Tensor:
    h = model[0](batch[0]).tanh()
    return F.cross_entropy(model[2](h), batch[1]) + model[2](reverse(h, 0.7)).square().mean()


def gradient_reversal_by_hook(model: Any, batch: Batch) -> Tensor:
    h = model[0](batch[0]).tanh()
    reversed_ = h * 1.0
    reversed_.register_hook(lambda g: -0.7 * g)
    return F.cross_entropy(model[2](h), batch[1]) + model[2](reversed_).square().mean()


class Surrogate(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(3 * x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g / (1 + x.abs()) ** 2


def surrogate_gradient(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model[2](Surrogate.apply(model[0](batch[0]))), batch[1])


# Custom backwards --------------------------------------------------------------------------------


class NoGrad(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + x**3 / 3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return g * (1 + x * x)


class Detached(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x + x**3 / 3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 + ctx.x.data * ctx.x)


class Intermediate(Function):
    """Saves what is neither an input nor an output: torch counts that as constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        ctx.save_for_backward(s, x)
        return x * s

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        s, x = ctx.saved_tensors
        return g * (s + x * s * (1 - s))


class Exponential(Function):
    """Two outputs, one of which was saved, and one that has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        y = torch.exp(scale * x)
        ctx.scale = scale
        ctx.save_for_backward(y)
        order = x.argsort(1)
        ctx.mark_non_differentiable(order)
        return y, order

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return g * ctx.scale * y, None


class Numpy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(np.cos(x.detach().numpy()))


class NumpyBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(np.cos(x.detach().numpy()))


class Once(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * torch.cos(x)


def through(function: Any, *more: Any) -> Loss:
    def loss(model: Any, batch: Batch) -> Tensor:
        h = function.apply(model[0](batch[0]), *more)
        h = h[0] if isinstance(h, tuple) else h
        return F.cross_entropy(model[2](h), batch[1])

    return loss


def some_batches(model: Any, batch: Batch) -> Tensor:
    """A custom Function, and a detached value, that only some batches reach."""
    h = model[0](batch[0])
    if batch[1][0] == 1:
        h = NoGrad.apply(h)
    y = model[2](h.tanh())
    if batch[1][1] == 1:
        y = y / y.norm().detach()
    return F.cross_entropy(y, batch[1])


def penalised(function: Any, *more: Any) -> Loss:
    """The gradient of a custom Function is in the loss."""

    def loss(model: Any, batch: Batch) -> Tensor:
        x = batch[0].clone().requires_grad_()
        h = function.apply(model[0](x), *more)
        y = model[2](h[0] if isinstance(h, tuple) else h)
        (g,) = grad(y.sum(), x, create_graph=True)
        return F.cross_entropy(y, batch[1]) + 0.1 * (g.norm(dim=1) - 1).square().mean()

    return loss


def implicit(model: Any, batch: Batch) -> Tensor:
    """A deep equilibrium: the fixed point without a graph, its gradient by a hook."""
    w, x = 0.5 * model[2].weight @ model[0].weight[:, :3], model(batch[0])

    def step(z: Tensor) -> Tensor:
        return torch.tanh(z @ w + x)

    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(60):
            z = step(z)
    z = step(z)
    start = z.clone().detach().requires_grad_()
    again = step(start)

    def hook(g: Tensor) -> Tensor:
        found = g
        for _ in range(60):
            found = torch.autograd.grad(again, start, found, retain_graph=True)[0] + g
        return found

    z.register_hook(hook)
    return F.cross_entropy(z, batch[1])


# Losses that hold gradients ----------------------------------------------------------------------


def maml(model: nn.Module, batch: Batch) -> Tensor:
    names, values = zip(*model.named_parameters(), strict=True)
    found = grad(_ce(model, batch), values, create_graph=True)
    moved = {n: p - 0.3 * g for n, p, g in zip(names, values, found, strict=True)}
    return F.cross_entropy(torch.func.functional_call(model, moved, (batch[2],)), batch[1])


def gradient_norm(model: nn.Module, batch: Batch) -> Tensor:
    loss = _ce(model, batch)
    found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 0.05 * sum(g.square().sum() for g in found)


def input_gradient(model: nn.Module, batch: Batch) -> Tensor:
    x = batch[0].clone().requires_grad_()
    y = model(x)
    (g,) = grad(y.sum(), x, create_graph=True)
    return y.mean() + (g.flatten(1).norm(dim=-1) - 1).square().mean() + 0.1 * y.square().mean()


def hessian_penalty(model: nn.Module, batch: Batch) -> Tensor:
    x = batch[0].clone().requires_grad_()
    (g,) = grad(model(x)[:, 0].sum(), x, create_graph=True)
    (h,) = grad(g[:, 0].sum(), x, create_graph=True)
    return h.square().mean() + _ce(model, batch)


def per_sample(model: nn.Module, batch: Batch) -> Tensor:
    def one(p: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, p, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(one), (None, 0, 0))
    found = each(dict(model.named_parameters()), batch[0], batch[1])
    return _ce(model, batch) + 0.05 * sum(g.square().sum() for g in found.values())


def jacobian_penalty(model: nn.Module, batch: Batch) -> Tensor:
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x: model(x)))(batch[0])
    return _ce(model, batch) + 0.1 * jacobians.square().mean()


def _normalised(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 6), norm(), nn.Tanh(), nn.Linear(6, 3))


def _images(draw: torch.Generator) -> Batch:
    return (torch.randn(4, 2, 5, 5, generator=draw, dtype=D),)


def _critic(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), norm(), nn.Tanh(), nn.Flatten(), nn.Linear(36, 1)
    )


# Numbers -----------------------------------------------------------------------------------------


def by_its_own_number(model: nn.Module, batch: Batch) -> Tensor:
    loss = _ce(model, batch)
    return loss / loss.item() + model(batch[2]).square().mean()


def by_a_number_of_numpy(model: nn.Module, batch: Batch) -> Tensor:
    y = model(batch[0])
    return F.cross_entropy(y / float(np.abs(y.detach().numpy()).mean()), batch[1])


LOSSES: Mapping[str, Hostile] = {
    **{
        loss.__name__: Hostile(mlp, rows, loss)
        for loss in (
            focal, normalised_focal, td, td_no_grad, td_inference, swav, simsiam, actor_critic, ppo,
            reinforce, standardised, balanced_terms, vq, surrogate, cosine_head, power_iteration,
            checkpointed, adversarial, first_order_maml, detached_maximum, pseudo_labels,
            with_metrics, hard_mining, gradient_reversal, gradient_reversal_by_hook,
            surrogate_gradient, some_batches, implicit, maml, gradient_norm, hessian_penalty,
            per_sample, jacobian_penalty,
        )
    },
    **{
        f"Function {function.__name__}": Hostile(mlp, rows, through(function, *more))
        for function, more in (
            (NoGrad, ()), (Detached, ()), (Intermediate, ()), (Exponential, (0.3,)), (Numpy, ()),
            (NumpyBackward, ()), (Once, ()),
        )
    },
    **{
        f"penalty of {function.__name__}": Hostile(mlp, rows, penalised(function, *more))
        for function, more in ((Exponential, (0.3,)), (Surrogate, ()))
    },
    "gradient_norm, LayerNorm": Hostile(_normalised(lambda: nn.LayerNorm(6)), rows, gradient_norm),
    "gradient_norm, GroupNorm": Hostile(
        _normalised(lambda: nn.GroupNorm(2, 6)), rows, gradient_norm
    ),
    "maml, BatchNorm": Hostile(_normalised(lambda: nn.BatchNorm1d(6)), rows, maml),
    "hessian_penalty, RMSNorm": Hostile(_normalised(lambda: nn.RMSNorm(6)), rows, hessian_penalty),
    "hessian_penalty, LayerNorm": Hostile(
        _normalised(lambda: nn.LayerNorm(6)), rows, hessian_penalty
    ),
    "per_sample, LayerNorm": Hostile(_normalised(lambda: nn.LayerNorm(6)), rows, per_sample),
    "WGAN-GP, InstanceNorm": Hostile(
        _critic(lambda: nn.InstanceNorm2d(4, affine=True)), _images, input_gradient
    ),
    "WGAN-GP, LayerNorm": Hostile(
        _critic(lambda: nn.LayerNorm([4, 3, 3])), _images, input_gradient
    ),
    "WGAN-GP, BatchNorm": Hostile(_critic(lambda: nn.BatchNorm2d(4)), _images, input_gradient),
    "WGAN-GP, weight_norm": Hostile(
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.utils.parametrizations.weight_norm(nn.Linear(50, 5)),
            nn.Tanh(),
            nn.Linear(5, 1),
        ),
        _images,
        input_gradient,
    ),
    "focal, BatchNorm": Hostile(_normalised(lambda: nn.BatchNorm1d(6)), rows, focal),
    "by_its_own_number": Hostile(mlp, rows, by_its_own_number, numbers=True),
    "by_a_number_of_numpy": Hostile(mlp, rows, by_a_number_of_numpy, numbers=True),
}  # fmt: skip
"""Name -> what to train."""
