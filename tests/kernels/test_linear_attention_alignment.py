"""Linear attention of tensors off the boundaries that Hopper's copy engine wants."""

import pytest
import torch

from kernel_checks import DEVICE, on_gpu_or_interpreted
from lintra.kernels import linear_attention
from lintra.kernels._common.kernel_call import KernelCall
from lintra.kernels.linear_attention import api as linear_attention_api
from lintra.kernels.linear_attention import configs, triton_bwd, triton_fwd, ways


@on_gpu_or_interpreted
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("dim", "length"), [(96, 256), (288, 512), (288, 1024)])
def test_a_tensor_off_a_boundary_decides_for_itself_only(monkeypatch, dim, length, backward):
    """The copy engine refuses it: a remembered layout does not tell, whichever came first."""
    for module in (ways, configs):
        monkeypatch.setattr(module, "architecture", lambda index: 90)
    monkeypatch.setattr(ways, "knows_gluon", lambda: True)
    numel = 2 * length * 2 * dim
    memory = torch.empty(numel + 1, dtype=torch.bfloat16, device=DEVICE)
    tensors = {first: memory[first : first + numel].view(2, length, 2, dim) for first in (0, 1)}
    assert tensors[0].data_ptr() % 16 == 0
    orders = []
    for order in ([0, 1, 0], [1, 0, 1]):
        linear_attention_api.CALLS._known.clear()
        triton_fwd._PLANS._known.clear()
        triton_bwd._PLANS._known.clear()
        launched = []
        for first in order:
            seen = []
            monkeypatch.setattr(KernelCall, "__call__", lambda self, *_, to=seen: to.append(self))
            if backward:
                triton_bwd.linear_attention_bwd(*[tensors[first]] * 4, "relu", "ratio", 1.0, 1e-6)
            else:
                linear_attention(*[tensors[first]] * 3, impl="triton")
            launched.append([call._kernel.__name__ for call in seen])
        assert launched[0] == launched[2] != launched[1]
        orders.append(dict(zip(order, launched, strict=True)))
    assert orders[0] == orders[1]


@on_gpu_or_interpreted
def test_gradients_ask_which_tensor_is_off_a_boundary(monkeypatch):
    """Queries or keys: both are one and the same to a remembered layout."""
    for module in (ways, configs):
        monkeypatch.setattr(module, "architecture", lambda index: 90)
    monkeypatch.setattr(ways, "knows_gluon", lambda: True)
    shape, numel = (2, 1024, 2, 288), 2 * 1024 * 2 * 288
    memory = torch.empty(numel + 1, dtype=torch.bfloat16, device=DEVICE)
    here, off = memory[:numel].view(shape), memory[1:].view(shape)
    calls = {"query": (here, off, here, here), "key": (here, here, off, here)}
    orders = []
    for order in (["query", "key"], ["key", "query"]):
        triton_bwd._PLANS._known.clear()
        launched = {}
        for name in order:
            seen = []
            monkeypatch.setattr(KernelCall, "__call__", lambda self, *_, to=seen: to.append(self))
            triton_bwd.linear_attention_bwd(*calls[name], "relu", "ratio", 1.0, 1e-6)
            launched[name] = [call._kernel.__name__ for call in seen]
        orders.append(launched)
    assert orders[0] == orders[1]
    assert orders[0]["query"] != orders[0]["key"]
