"""torch.compile without graph breaks, torch.export with any batch size, ONNX with parity."""

from pathlib import Path

import pytest
import torch

from lintra.vision import fold_norms
from vision_names import NAMES, create_small

# One linear name of each method and family where they differ; the others are `slow`.
QUICK = {
    "deit_tiny_inline_patch16_224",
    "swin_tiny_slab_patch4_window56_224",
    "pvt_tiny_prepbn",
    "cswin_tiny_inline_224",
}
SWEEP = [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES]


def shallow(name: str, **kwargs) -> torch.nn.Module:
    """A block of each kind is enough: the time goes into graphs."""
    if name.startswith("deit"):
        return create_small(name, depth=1, **kwargs)
    if name.startswith("swin_base_inline"):
        return create_small(name, **kwargs)
    return create_small(name, depths=(1, 1, 1, 1), **kwargs)


@pytest.mark.parametrize("name", SWEEP)
def test_compiles_without_breaks(name: str) -> None:
    torch._dynamo.reset()
    model = shallow(name, drop_path_rate=0.1)
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", SWEEP)
@torch.no_grad()
def test_exports_for_any_batch_and_to_onnx(name: str, tmp_path: Path) -> None:
    model = fold_norms(shallow(name).eval())
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(program.module()(x), expected)

    pytest.importorskip("onnxscript", reason="needs the packages of the `test` extra")
    runtime = pytest.importorskip("onnxruntime", reason="needs the packages of the `test` extra")
    file = tmp_path / "model.onnx"
    torch.onnx.export(program, (), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_exports_before_folding(name: str) -> None:
    model = shallow(name).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("name", sorted(QUICK))
@torch.no_grad()
def test_traces(name: str) -> None:
    model = shallow(name).eval()
    traced = torch.jit.trace(model, torch.randn(2, 3, 64, 64), check_trace=False)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(traced(x), model(x))
