"""How a kernel is compared with its reference: every result, by the three-way rule."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

# What runs the kernels here: the GPU if there is one, else Triton's interpreter on the CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

on_gpu_or_interpreted = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a CUDA GPU or TRITON_INTERPRET=1 from the start",
)


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], d_out: Tensor) -> list:
    """The output of `function(*inputs)` and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    # In this thread, else a GPU's backward pass would not see what the test has pinned.
    with torch.autograd.set_multithreading_enabled(False):
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def assert_three_way(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    d_out: Tensor,
    *,
    textbook: Callable[..., Tensor] | None = None,
    num_terms: int = 0,
) -> None:
    """err(kernel, float64) <= 2 err(textbook in the same dtype, float64) + eps max|float64|.

    Args:
        kernel: what is checked.
        reference: gives the float64 results.
        inputs: of all three.
        d_out: gradient of the output.
        textbook: the formula with every step in the dtype of the inputs; None for `reference`.
        num_terms: of the sums, if not 0. In float32 the kernel may also err by the rounding of sums
            taken in order, 4 eps sqrt(num_terms) times the largest of all results: what cancels, as
            the gradient of the query of a single key, keeps the rounding of its terms.
    """
    exact = results(reference, [x.double() for x in inputs], d_out.double())
    plain = results(textbook or reference, inputs, d_out)
    eps = torch.finfo(inputs[0].dtype).eps
    order = 0.0
    if inputs[0].dtype == torch.float32 and num_terms:
        largest = max(x.abs().max().item() for x in exact if x.numel())
        order = 4 * eps * num_terms**0.5 * largest
    for place, (got, same, true) in enumerate(
        zip(results(kernel, inputs, d_out), plain, exact, strict=True)
    ):
        assert got.dtype == same.dtype
        assert got.shape == same.shape
        if true.numel() == 0:
            continue
        error = (got.double() - true).abs().max()
        allowed = 2 * (same.double() - true).abs().max() + eps * true.abs().max() + order
        assert error <= allowed, f"result {place}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: what a kernel does not write, or reads too early, shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments, **options) -> Tensor:
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
