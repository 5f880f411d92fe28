"""The check before any clock runs: no further from float64 than twice the eager reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .case import Case, Run


def _leaves(inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [
        (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_(x.requires_grad)
        for x in inputs
    ]


def _results(
    run: Run, inputs: Sequence[Tensor], weight: Tensor | None, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Output and the gradient of each input that has one."""
    leaves = _leaves(inputs, dtype)
    wanted = [x for x in leaves if x.requires_grad]
    out = run(*leaves)
    if weight is None or not wanted:
        return [out.detach()]
    grads = torch.autograd.grad(out, wanted, weight.to(out.dtype))
    return [x.detach() for x in (out, *grads)]


def check(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> str | None:
    """What is wrong with the case's output or gradients, None if nothing is.

    ``err(ours) <= 2 err(reference in the same dtype) + eps(dtype) max|exact|``, errors against the
    reference in float64, the largest of a tensor.
    """
    for part in case.checks:
        if problem := check(part, device, dtype, seed):
            return f"{part}: {problem}"
    if case.reference is None:
        return None
    torch.manual_seed(seed)
    run = case.ours.prepare()
    inputs = case.cut(case.make(device, dtype))
    with torch.no_grad():
        like = run(*inputs)
    weight = torch.randn_like(like) if "bwd" in case.directions else None
    ours = _results(run, inputs, weight)
    same = _results(case.reference, inputs, weight)
    exact = _results(case.reference, inputs, weight, torch.float64)
    names = ["output", *(f"gradient {i}" for i in range(len(ours) - 1))]
    for name, mine, theirs, truth in zip(names, ours, same, exact, strict=True):
        if mine.shape != truth.shape:
            return f"{name} must have shape {tuple(truth.shape)}, got {tuple(mine.shape)}"
        error = _distance(mine, truth)
        allowed = 2 * _distance(theirs, truth) + torch.finfo(dtype).eps * _largest(truth)
        if not error <= allowed:  # also true for nan
            return f"{name} must be within {allowed:.3g} of float64, got an error of {error:.3g}"
    return None


def _distance(x: Tensor, truth: Tensor) -> float:
    # Row by row: whole float64 copies of the largest tensors are gigabytes. The maximum of a
    # tensor keeps a nan, that of Python does not.
    parts = zip(x.split(1), truth.split(1), strict=True)
    rows = [(a.double() - b).abs().max() for a, b in parts if a.numel()]
    return torch.stack(rows).max().item() if rows else 0.0


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
