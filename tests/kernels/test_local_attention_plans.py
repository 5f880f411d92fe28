"""Launches of local attention that are planned once a layout: arguments, views, memory."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_checks import DEVICE, on_gpu_or_interpreted
from lintra.kernels import local_attention
from lintra.kernels._common.plans import Plans
from lintra.kernels.local_attention import configs

GRID, PREFIX = (3, 5), 9  # 24 tokens, of which four parts are cut
ON_GPU = {"grid": (16, 16), "num_prefix": 16}  # parts that cuDNN takes


def inputs_of(
    dim: int, extra: int = 0, *, tokens: int = PREFIX + math.prod(GRID), batch: int = 1,
    offset: int = 0, dtype: torch.dtype = torch.bfloat16, device: str = "cpu",
) -> list[Tensor]:  # fmt: skip
    """Views of a fused projection, `offset` elements after the start of its memory."""
    heads = 2

    def made(*shape: int) -> Tensor:
        memory = torch.randn(math.prod(shape) + offset, device=device).to(dtype)
        return memory[offset:].view(shape)

    return [
        *made(batch, tokens, 3, heads, dim).unbind(2),
        *(made(batch, extra, heads, dim) for _ in range(2 if extra else 0)),
    ]


def attend(inputs: list[Tensor], impl: str = "triton", **options: Any) -> list[Tensor]:
    extra = dict(zip(("extra_key", "extra_value"), inputs[3:], strict=False))
    options = {"grid": GRID, "radius": 2.5, "num_prefix": PREFIX, **options}
    return list(local_attention(*inputs[:3], **extra, **options, return_lse=True, impl=impl))


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The launchers, as they are where nothing has been planned yet."""
    pytest.importorskip("triton")
    from lintra.kernels.local_attention import triton_fwd, triton_merge

    api = import_module("lintra.kernels.local_attention.api")  # its package holds a function
    monkeypatch.setattr(api, "_CALLS", Plans(api._checked))
    monkeypatch.setattr(triton_fwd, "_PLANS", Plans(triton_fwd._plan))
    monkeypatch.setattr(triton_merge, "_MERGES", Plans(triton_merge._plan_merge))
    return SimpleNamespace(fwd=triton_fwd, merge=triton_merge)


class Kernel:
    """Takes the place of a kernel: keeps its arguments by their names."""

    function, packed_metadata = 7, (9, 1, 0)

    def __init__(self, kernel: Any, log: list[tuple[str, str, dict[str, Any]]]) -> None:
        self.name, self.log = kernel.__name__, log
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., "Kernel"]:
        def launch(*arguments: Any, **constants: Any) -> "Kernel":
            constants = {k: v for k, v in constants.items() if k in self.arg_names}
            named = dict(zip(self.arg_names, arguments, strict=False)) | constants
            self.log.append((self.name, "ordinary", {**named, "grid": (*grid, 1, 1)[:3]}))
            return self

        return launch

    def run(self, *arguments: Any) -> None:
        named = dict(zip(self.arg_names, arguments[9:], strict=True))
        self.log.append((self.name, "direct", {**named, "grid": arguments[:3]}))


def described(argument: Any) -> Any:
    """Comparable: memory by its address, boxes by all that they say."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if hasattr(argument, "base"):
        return {**vars(argument), "base": argument.base.data_ptr()}
    return argument


@pytest.fixture
def launches(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """What would be launched on Hopper; nothing is."""
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="needs Gluon")
    from lintra.kernels._common import kernel_call
    from lintra.kernels.local_attention import hopper_fwd

    log: list[tuple[str, str, dict[str, Any]]] = []
    for module, name in (
        (modules.fwd, "_local_attention_fwd_kernel"),
        (modules.merge, "_merge_kernel"),
        (hopper_fwd, "_local_attention_fwd_hopper_kernel"),
    ):
        kernel = getattr(module, name)
        if not hasattr(kernel, "arg_names"):
            pytest.skip("this triton names no arguments")
        monkeypatch.setattr(module, name, Kernel(kernel, log))
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    fake = SimpleNamespace(
        __version__="3.6.0",
        knobs=SimpleNamespace(runtime=hooks),
        runtime=SimpleNamespace(driver=SimpleNamespace(active=driver)),
    )
    monkeypatch.setattr(kernel_call, "triton", fake)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(configs, "architecture", lambda _: 90)
    monkeypatch.setattr(configs, "knows_gluon", lambda: True)
    monkeypatch.setattr(configs, "prefix_way", lambda *_: "general")
    # Few tokens in several parts, which are merged.
    monkeypatch.setattr(configs, "parts_of", lambda *_: (3, 8))
    return log


@pytest.mark.parametrize("extra", [0, 8])
@pytest.mark.parametrize("dim", [64, 24])
def test_direct_launches_have_the_arguments_of_ordinary_ones(launches, modules, dim, extra):
    place = (*GRID, PREFIX, 2.5, 0.25)
    names = ["_local_attention_fwd_kernel", "_local_attention_fwd_kernel", "_merge_kernel"]
    if dim == 64:
        names[0] = "_local_attention_fwd_hopper_kernel"
    inputs = [inputs_of(dim, extra), inputs_of(dim, extra, offset=8)]
    absent = [None] * (0 if extra else 2)
    for tensors in (*inputs, inputs[1]):
        modules.fwd.local_attention_fwd(*tensors, *absent, *place)
    assert [x[:2] for x in launches] == [
        (name, way) for way in ("ordinary", "direct", "direct") for name in names
    ]
    # All but the memory, which is fresh for results, follows from the layout.
    for first, second in zip(launches[:3], launches[3:6], strict=True):
        assert list(first[2]) == list(second[2])
        for name in first[2]:
            one, two = (described(launch[2][name]) for launch in (first, second))
            if name.startswith("p_"):
                assert isinstance(two, int)
            elif isinstance(one, dict):
                assert {**one, "base": 0} == {**two, "base": 0}, name
            else:
                assert one == two, name
    query, key, value = inputs[1][:3]
    arguments = {name: described(x) for name, x in launches[3][2].items()}
    if dim == 64:
        later = {name: x["base"] for name, x in arguments.items() if name.endswith("_desc")}
        step = PREFIX * query.stride(1) * query.element_size()
        for name, x in (("q", query), ("k", key), ("v", value)):
            assert later[f"{name}_desc"] == x.data_ptr() + step
        own = [x.data_ptr() for x in (inputs[1][3:] if extra else (key, value))]
        assert [later["pk_desc"], later["pv_desc"]] == [key.data_ptr(), value.data_ptr()]
        assert [later["ek_desc"], later["ev_desc"]] == own
    else:
        assert [arguments[f"p_{x}"] for x in "qkv"] == [x.data_ptr() for x in (query, key, value)]
    assert arguments["num_extra"] == extra


def test_memory_off_the_boundary_takes_the_general_kernel(launches, modules):
    place = (*GRID, PREFIX, 2.5, 0.25)
    for offset in (0, 1, 8, 1, 0):
        modules.fwd.local_attention_fwd(*inputs_of(64, offset=offset), None, None, *place)
    image = [(name, way) for name, way, arguments in launches if arguments.get("IMAGE", "D")]
    image = [x for x in image if x[0] != "_merge_kernel"]
    assert image == [
        ("_local_attention_fwd_hopper_kernel", "ordinary"),
        ("_local_attention_fwd_kernel", "ordinary"),
        ("_local_attention_fwd_hopper_kernel", "direct"),
        ("_local_attention_fwd_kernel", "ordinary"),
        ("_local_attention_fwd_hopper_kernel", "direct"),
    ]


def dense(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float) -> tuple:
    """As much of cuDNN's attention as the launcher asks for, (B, H, N, D), on any device."""
    scores = (query.float() @ key.float().mT) * scale
    out = (scores.softmax(-1) @ value.float()).to(query.dtype)
    # In the order of the queries, as cuDNN.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, scores.logsumexp(-1, keepdim=True), None, None


@on_gpu_or_interpreted
@pytest.mark.parametrize("batch", [1, 2])
def test_ranges_of_keys_in_dense_attention(modules, monkeypatch, batch):
    monkeypatch.setattr(configs, "prefix_way", lambda *_: "sdpa")
    counts = []

    def counted(query: Tensor, *arguments: Any, **options: Any) -> tuple:
        counts.append(query.shape[0])
        return dense(query, *arguments, **options)

    monkeypatch.setattr(modules.merge, "_sdpa", counted)
    for offset in (0, 4, 8):  # the same plan for other memory
        inputs = inputs_of(16, batch=batch, offset=offset, dtype=torch.float32, device=DEVICE)
        torch.testing.assert_close(attend(inputs), attend(inputs, "reference"))
    assert counts == [4 if batch == 1 else 2] * 3
    # cuDNN is not asked for memory off its boundary.
    inputs = inputs_of(16, batch=batch, offset=1, dtype=torch.float32, device=DEVICE)
    torch.testing.assert_close(attend(inputs), attend(inputs, "reference"))
    assert len(counts) == 3


def test_prefix_queries_have_our_kernel_where_pytorch_lacks_dense_attention(monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda _: 90)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    tokens = torch.empty(1, 8, 2, 16, dtype=torch.bfloat16)
    assert configs.prefix_way(tokens, tokens) == "sdpa"
    monkeypatch.delattr(torch, configs.CUDNN_ATTENTION)
    assert configs.prefix_way(tokens, tokens) == "general"


@on_gpu_or_interpreted
@pytest.mark.parametrize("extra", [0, 6])
def test_a_plan_serves_other_memory(modules, extra):
    for offset in (0, 1, 4):
        inputs = inputs_of(16, extra, offset=offset, dtype=torch.float32, device=DEVICE)
        torch.testing.assert_close(attend(inputs), attend(inputs, "reference"))
        # Channels that do not lie side by side are copied.
        strange = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs]
        torch.testing.assert_close(attend(strange), attend(inputs, "reference"))


@on_gpu_or_interpreted
def test_absent_extra_keys_are_no_extra_keys():
    inputs = inputs_of(16, dtype=torch.float32, device=DEVICE)
    empty = [x[:, :0] for x in inputs[1:]]
    leaves = [x.detach().requires_grad_() for x in inputs]
    expected = attend(inputs)
    for got in (attend([*inputs, *empty]), attend(leaves)):
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_remembered_number_does_not_let_its_equal_pass(impl):
    x = torch.rand(1, 4, 1, 8)
    options = {"grid": (1, 3), "radius": 1, "num_prefix": 1, "scale": 1, "impl": impl}
    local_attention(x, x, x, **options)
    for name in ("radius", "num_prefix", "scale"):
        with pytest.raises(TypeError, match=f"`{name}` must be .*, got bool"):
            local_attention(x, x, x, **{**options, name: True})


@contextmanager
def ordinary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without direct launches."""
    from lintra.kernels._common import kernel_call

    with monkeypatch.context() as patch:
        patch.setattr(kernel_call, "_watched", lambda: True)
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("extra", [0, 40])
@pytest.mark.parametrize("dim", [64, 128])
def test_direct_launches_equal_ordinary_ones(monkeypatch, dim, extra, dtype):
    kind = {"tokens": 272, "dtype": dtype, "device": "cuda"}
    for radius in (2.5, 7):
        options = {**ON_GPU, "radius": radius}
        attend(inputs_of(dim, extra, **kind), **options)
        for offset in (0, 1, 8, 0):
            inputs = inputs_of(dim, extra, **kind, offset=offset)
            got = attend(inputs, **options)
            with ordinary(monkeypatch):
                expected = attend(inputs, **options)
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_within_a_cuda_graph(batch):
    inputs, fresh = (inputs_of(128, tokens=272, batch=batch, device="cuda") for _ in range(2))
    for _ in range(2):
        attend(inputs, **ON_GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(inputs, **ON_GPU)
    for x, y in zip(inputs, fresh, strict=True):
        x.copy_(y)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, attend(inputs, **ON_GPU), strict=True))
