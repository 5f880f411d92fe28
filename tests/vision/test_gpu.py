"""The backbones on a GPU: the numbers of the CPU, half precision, training, compilation."""

import copy

import pytest
import torch

from golden_vision import relative_error
from lintra.vision import fold_norms
from vision_names import create_small

pytestmark = pytest.mark.gpu

NAMES = [
    "deit_tiny_inline_patch16_224",
    "deit_tiny_slab_patch16_224",
    "swin_tiny_slab_patch4_window56_224",
    "swin_base_inline_patch4_window56_224",
    "pvt_tiny_prepbn",
    "pvt_tiny_inline",
    "cswin_tiny_slab_224",
    "cswin_tiny_inline_224",
]
every_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@every_name
def test_equals_the_cpu_forward_and_backward(name: str) -> None:
    model = create_small(name, drop_path_rate=0.0).train()
    on_gpu, exact = copy.deepcopy(model).cuda(), copy.deepcopy(model).double()
    x = torch.randn(4, 3, 64, 64)
    for network, images in ((model, x), (on_gpu, x.cuda()), (exact, x.double())):
        network(images).square().mean().backward()
    for (parameter, ours), cpu, true in zip(
        on_gpu.named_parameters(), model.parameters(), exact.parameters(), strict=True
    ):
        # Some gradients are small differences of large sums: float32 on the CPU errs as well.
        rounding = (cpu.grad - true.grad).abs().max()
        error = (ours.grad.cpu() - true.grad).abs().max()
        assert error <= 1e-4 * true.grad.abs().max() + 5 * rounding, parameter
    with torch.no_grad():
        expected = model.eval()(x)
        assert relative_error(on_gpu.eval()(x.cuda()).cpu(), expected) < 1e-4
        assert relative_error(fold_norms(on_gpu)(x.cuda()).cpu(), expected) < 1e-4


@every_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_weights_are_finite(name: str, dtype: torch.dtype) -> None:
    model = create_small(name).cuda().train()
    x = torch.randn(4, 3, 64, 64, device="cuda")
    with torch.autocast("cuda", dtype):
        out = model(x)
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.to(dtype).eval()(x.to(dtype)).isfinite().all()


@every_name
@torch.no_grad()
def test_inductor(name: str) -> None:
    torch._dynamo.reset()
    model = create_small(name).cuda().eval()
    x = torch.randn(4, 3, 64, 64, device="cuda")
    compiled = torch.compile(model, fullgraph=True)
    assert relative_error(compiled(x), model(x)) < 1e-4
