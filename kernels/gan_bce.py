"""Adversarial losses from logits, each one operation: a launch forward, a launch backward.

    loss = mean(term(real)) + mean(term(fake))          the discriminator's
    loss = mean(term(fake))                             the generator's

Terms are computed in float32 from the logits x of D, before any sigmoid; t is a target or a sign:

    term        value                                   derivative
    bce         t softplus(-x) + (1 - t) softplus(x)    sigmoid(x) - t
    saturating  -softplus(x)                            -sigmoid(x)
    hinge       max(0, 1 - t x)                         -t where t x < 1
    square      (x - t)^2 / 2                           x - t
    linear      t x                                     t

The backward pass reads the logits again, keeps nothing else, and rounds once: grad * derivative / n
is taken in float32 before it becomes the logits' dtype, so that loss scaling works in float16.
Derivatives of every order exist; those beyond the first are plain PyTorch. Under torch.func's
transforms only the reference works.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch
from kernels.dispatch import wide

NAME = "gan_bce"
Form = Literal["bce", "minimax", "hinge", "least_squares", "wasserstein"]

# (term, t) of the generator, and (term, t of real, t of fake) of the discriminator; None: a target.
GENERATOR: dict[str, tuple[str, float]] = {
    "bce": ("bce", 1.0),
    "minimax": ("saturating", 0.0),
    "hinge": ("linear", -1.0),
    "least_squares": ("square", 1.0),
    "wasserstein": ("linear", -1.0),
}
DISCRIMINATOR: dict[str, tuple[str, float | None, float | None]] = {
    "bce": ("bce", None, None),
    "minimax": ("bce", None, None),
    "hinge": ("hinge", 1.0, -1.0),
    "least_squares": ("square", None, None),
    "wasserstein": ("linear", -1.0, 1.0),
}


def discriminator(
    real_N: Tensor,
    fake_N: Tensor,
    form: Form = "bce",
    real_target: float = 1.0,
    fake_target: float = 0.0,
) -> Tensor:
    """What the discriminator minimises, () float32, from logits of any float dtype and any shape;
    there may be more of one than of the other.

    bce, minimax: -E[log D(x)] - E[log(1 - D(G(z)))], Goodfellow et al. 2014, equation 1; a
    real_target below 1 is one-sided label smoothing (Salimans et al. 2016, section 3.4).
    hinge: E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))], Lim and Ye 2017, "Geometric GAN".
    least_squares: 1/2 E[(D(x) - 1)^2] + 1/2 E[D(G(z))^2], Mao et al. 2017, "Least squares
    generative adversarial networks", with b = real_target and a = fake_target.
    wasserstein: E[D(G(z))] - E[D(x)], Arjovsky et al. 2017, "Wasserstein GAN", algorithm 1.

    Raises ValueError for a form that is unknown, for one without targets that is given some, and
    for no logits.
    """
    term, real, fake = _of(DISCRIMINATOR, form)
    if real is not None and (real_target, fake_target) != (1, 0):
        raise ValueError(f"form={form!r} has no targets; leave real_target=1 and fake_target=0")
    ts = (float(real_target), float(fake_target)) if real is None else (real, fake)
    return _mean((real_N, fake_N), term, ts)


def generator(fake_N: Tensor, form: Form = "bce") -> Tensor:
    """What the generator minimises, () float32, from logits of any float dtype and any shape.

    bce: -E[log D(G(z))], non-saturating (Goodfellow et al. 2014, section 3, end).
    minimax: E[log(1 - D(G(z)))] (equation 1 there). hinge, wasserstein: -E[D(G(z))].
    least_squares: 1/2 E[(D(G(z)) - 1)^2], c = 1.
    """
    term, t = _of(GENERATOR, form)
    return _mean((fake_N,), term, (t,))


def reference(logits: Sequence[Tensor], term: str, ts: Sequence[float]) -> Tensor:
    """The loss in plain PyTorch, () float32 (float64 of float64), differentiable at all orders."""
    means = [_term(wide(x), term, t).mean() for x, t in zip(logits, ts, strict=True)]
    return means[0] if len(means) == 1 else means[0] + means[1]


def _of(forms: dict[str, Any], form: str) -> Any:
    if form not in forms:
        raise ValueError(f"form={form!r} is unknown; the forms are {', '.join(forms)}")
    return forms[form]


def _term(x: Tensor, term: str, t: float) -> Tensor:
    if term == "bce":
        if t in (0.0, 1.0):  # half the work, and no 0 * inf
            return F.softplus(-x if t else x)
        return t * F.softplus(-x) + (1 - t) * F.softplus(x)
    if term == "saturating":
        return -F.softplus(x)
    if term == "hinge":
        return F.relu(1 - t * x)
    if term == "square":
        return 0.5 * (x - t).square()
    return t * x


def _mean(logits: tuple[Tensor, ...], term: str, ts: tuple[float, ...]) -> Tensor:
    for x in logits:
        if x.numel() == 0:
            raise ValueError(f"no logits to take the mean of: their shape is {tuple(x.shape)}")
    if not dispatch.serves(NAME, *logits):
        return reference(logits, term, ts)
    if torch.compiler.is_compiling():
        return forward_op(logits, term, ts)
    with torch.cuda.device_of(logits[0]):  # Triton launches on the current device
        return _Loss.apply(term, ts, *logits)


def _reference_gradient(
    grad: Tensor, logits: Sequence[Tensor], term: str, ts: Sequence[float]
) -> tuple[Tensor, ...]:
    """What the backward kernel computes, in plain PyTorch."""
    _, pull = torch.func.vjp(lambda *x: reference(x, term, ts), *logits)
    return pull(grad)


def _second_order(
    upstream: Sequence[Tensor],
    grad: Tensor,
    logits: Sequence[Tensor],
    term: str,
    ts: Sequence[float],
) -> tuple[Tensor, ...]:
    """Gradients of the backward pass with respect to grad and to the logits."""
    _, pull = torch.func.vjp(lambda g, *x: _reference_gradient(g, x, term, ts), grad, *logits)
    return pull(tuple(upstream))


class _Loss(torch.autograd.Function):
    """The eager path, at half the registered operation's cost on the CPU."""

    @staticmethod
    @dispatch.eagerly()
    def forward(ctx: Any, term: str, ts: tuple[float, ...], *logits: Tensor) -> Tensor:
        _keep(ctx, (logits, term, ts), None)
        return _forward(logits, term, ts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_Gradient.apply(grad, ctx.term, ctx.ts, *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """The loss's gradient, itself differentiable."""

    @staticmethod
    @dispatch.eagerly()
    def forward(
        ctx: Any, grad: Tensor, term: str, ts: tuple[float, ...], *logits: Tensor
    ) -> tuple[Tensor, ...]:
        _keep_gradient(ctx, (grad, logits, term, ts), None)
        return tuple(_backward(grad, logits, term, ts))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, *logits = ctx.saved_tensors
        of_grad, *of_logits = _second_order(upstream, grad, logits, ctx.term, ctx.ts)
        return of_grad, None, None, *of_logits


def _forward(logits: Sequence[Tensor], term: str, ts: Sequence[float]) -> Tensor:
    from kernels import gan_bce_triton

    return gan_bce_triton.forward(logits, term, ts)


def _backward(
    grad: Tensor, logits: Sequence[Tensor], term: str, ts: Sequence[float]
) -> list[Tensor]:
    from kernels import gan_bce_triton

    return gan_bce_triton.backward(grad, logits, term, ts)


def _fake_forward(logits: Sequence[Tensor], term: str, ts: Sequence[float]) -> Tensor:
    return logits[0].new_empty((), dtype=torch.float32)


def _fake_backward(
    grad: Tensor, logits: Sequence[Tensor], term: str, ts: Sequence[float]
) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in logits]


def _keep(ctx: Any, inputs: tuple, output: Tensor | None) -> None:
    logits, ctx.term, ctx.ts = inputs
    ctx.save_for_backward(*logits)


def _keep_gradient(ctx: Any, inputs: tuple, output: Sequence[Tensor] | None) -> None:
    grad, logits, ctx.term, ctx.ts = inputs
    ctx.save_for_backward(grad, *logits)


forward_op = dispatch.register(f"{NAME}_forward", _forward, _fake_forward)
backward_op = dispatch.register(f"{NAME}_backward", _backward, _fake_backward)


def _first(ctx: Any, grad: Tensor) -> tuple:
    return backward_op(grad, ctx.saved_tensors, ctx.term, ctx.ts), None, None


def _second(ctx: Any, upstream: Sequence[Tensor]) -> tuple:
    grad, *logits = ctx.saved_tensors
    of_grad, *of_logits = _second_order(upstream, grad, logits, ctx.term, ctx.ts)
    return of_grad, of_logits, None, None


forward_op.register_autograd(_first, setup_context=_keep)
backward_op.register_autograd(_second, setup_context=_keep_gradient)
