"""The gated sum of the blocks: what the operation computes, and what is left to addcmul."""

import pytest
import torch

from lintra.diffusion.models import modulation
from lintra.diffusion.models.modulation import gated, gated_modulated
from lintra.kernels.ada_layer_norm import configs

SHAPE = (2, 5, 8)


@pytest.fixture
def sums(monkeypatch):
    """Takes sums of this size for large ones; the shapes of those that the operation computes."""
    seen, add = [], modulation.gated_add

    def counted(x, update, gate):
        seen.append(x.shape)
        return add(x, update, gate)

    monkeypatch.setattr(modulation, "gated_add", counted)
    monkeypatch.setattr(configs, "GATED_ADD_MIN_ELEMENTS", 80)
    return seen


def tensors(gates=2, dtypes=(torch.float32,) * 3):
    given = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(gates, 48).chunk(6, dim=1)[5]
    return [x.to(dtype) for x, dtype in zip(given, dtypes, strict=True)]


def addcmul(tokens, update, gate):
    return torch.addcmul(tokens, gate.unsqueeze(1), update)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_large_sums_are_those_of_the_operation(sums, dtype):
    given = tensors(dtypes=(dtype,) * 3)
    assert torch.equal(gated(*given), addcmul(*given))
    assert sums == [SHAPE]
    given[0] = given[0].mT.contiguous().mT
    assert torch.equal(gated(*given), addcmul(*given))


def test_small_sums_are_left_to_pytorch(sums, monkeypatch):
    monkeypatch.setattr(configs, "GATED_ADD_MIN_ELEMENTS", 81)
    given = tensors()
    assert torch.equal(gated(*given), addcmul(*given))
    assert not sums


def test_small_sums_in_training(sums, monkeypatch):
    monkeypatch.setattr(configs, "GATED_ADD_MIN_ELEMENTS", 81)
    tokens, update, gate = tensors()
    update.requires_grad_()
    assert torch.equal(gated(tokens, update, gate), addcmul(tokens, update, gate))
    assert len(sums) == 1
    with torch.no_grad():
        gated(tokens, update, gate)
    assert len(sums) == 1


@pytest.mark.parametrize("narrow", [0, 1, 2])
def test_the_widest_dtype_wins(sums, narrow):
    dtypes = [torch.float32] * 3
    dtypes[narrow] = torch.bfloat16
    given = tensors(dtypes=dtypes)
    out = gated(*given)
    assert out.dtype == torch.float32
    assert torch.equal(out, addcmul(*given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated(*given), addcmul(*given))
    assert not sums


def test_one_gate_or_one_update_for_all(sums):
    tokens, update, gate = tensors(gates=1)
    for other in (update, update[:1], update[:, :1]):
        given = tokens, other, gate
        assert torch.equal(gated(*given), addcmul(*given))
    given = tokens, update[:, :1], gate.expand(2, 8)
    assert torch.equal(gated(*given), addcmul(*given))
    assert not sums


def test_gradients_and_compilation(sums):
    given = [x.double().requires_grad_() for x in tensors()]
    assert torch.autograd.gradcheck(gated, given)
    assert sums
    sums.clear()
    compiled = torch.compile(gated, fullgraph=True, backend="eager", dynamic=True)
    for few in (given, [x[:1] for x in given]):
        torch.testing.assert_close(compiled(*few), addcmul(*few))
    assert not sums


def test_a_norm_that_is_called_follows_the_same_sum(sums):
    norm = torch.nn.LayerNorm(8)
    tokens, update, gate = tensors()
    summed, normed = gated_modulated(norm, tokens, update, gate, gate, gate)
    assert sums == [SHAPE]
    expected = addcmul(tokens, update, gate)
    assert torch.equal(summed, expected)
    expected = norm(expected) * (1 + gate[:, None]) + gate[:, None]
    torch.testing.assert_close(normed, expected)
