"""A kernel is launched by itself only where that equals Triton's own launch."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lintra.kernels import linear_attention, token_conv2d

module = pytest.importorskip("lintra.kernels._common.kernel_call", reason="needs triton")
KernelCall = module.KernelCall


class Kernel:
    """As much of Triton's JITFunction and CompiledKernel as a launch uses; keeps a log."""

    arg_names = ["p_x", "p_o", "rows", "WIDTH", "BLOCK"]
    function, packed_metadata = 77, (4, 1, 0)

    def __init__(self, compiles: bool = True) -> None:
        self.log: list[tuple[str, tuple[object, ...]]] = []
        self.compiles = compiles

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.log.append(("triton", (grid, *arguments, constants)))
            return self if self.compiles else None

        return launch

    def run(self, *arguments):
        self.log.append(("direct", arguments))

    @property
    def ways(self) -> list[str]:
        return [way for way, _ in self.log]


class Chain:
    def __init__(self) -> None:
        self.calls: list[object] = []


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    hooks = SimpleNamespace(launch_enter_hook=Chain(), launch_exit_hook=Chain())
    driver = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda _: fake.stream)
    fake = SimpleNamespace(
        __version__="3.6.0",
        stream=11,
        knobs=SimpleNamespace(runtime=hooks),
        runtime=SimpleNamespace(driver=SimpleNamespace(active=driver)),
    )
    monkeypatch.setattr(module, "triton", fake)
    monkeypatch.setattr(torch.version, "hip", None)
    return fake


CONSTANTS = {"BLOCK": 64, "num_warps": 4, "WIDTH": 8}


def call_of(kernel: Kernel, constants: dict[str, object] = CONSTANTS) -> KernelCall:
    return KernelCall(kernel, (5,), (9,), constants)


def tensors(offset: int = 0) -> tuple[Tensor, Tensor]:
    """Two whose memory begins `offset` elements after a boundary of 16 bytes."""
    made = tuple(torch.zeros(64)[offset : offset + 8] for _ in range(2))
    assert all(x.data_ptr() % 16 == 4 * offset for x in made)
    return made


def test_the_first_call_compiles_and_the_next_is_direct(triton):
    kernel = Kernel()
    call = call_of(kernel)
    first, second = tensors(), tensors()
    call(*first)
    triton.stream = 12  # the current one of the time
    call(*second)
    (way, arguments), direct = kernel.log
    assert way == "triton"
    assert arguments == ((5,), *first, 9, CONSTANTS)
    pointers = [x.data_ptr() for x in second]
    # Constants in the order of the signature, without options of the launch.
    expected = (5, 1, 1, 12, 77, (4, 1, 0), None, None, None, *pointers, 9, 8, 64)
    assert direct == ("direct", expected)


def test_boxes_come_first_and_are_checked_once(triton):
    class Box:
        def of(self, tensor):
            return ("checked", tensor.data_ptr())

        def at(self, tensor):
            return ("box", tensor.data_ptr())

    kernel = Kernel()
    kernel.arg_names = ["q0_d", "q1_d", "k_d", "p_o", "rows", "WIDTH", "BLOCK"]
    boxes = [(0, Box()), (0, Box()), (1, Box())]
    call = KernelCall(kernel, (5,), (9,), CONSTANTS, boxes, only_boxes=2)
    for _ in range(2):
        query, key, out = *tensors(), tensors()[0]
        call(query, key, out)
    (way, ordinary), (last_way, direct) = kernel.log
    assert (way, last_way) == ("triton", "direct")
    assert [x[0] for x in ordinary[1:4]] == ["checked"] * 3
    assert ordinary[5] == 9
    addresses = [x.data_ptr() for x in (query, query, key)]
    assert direct[9:12] == tuple(("box", address) for address in addresses)
    assert direct[12:] == (out.data_ptr(), 9, 8, 64)


def test_a_box_is_a_tensor_descriptor():
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="needs Gluon")
    from triton.experimental.gluon import language as gl

    from lintra.kernels._common.boxes import Box

    box = Box([2, 64], [64, 1], [1, 64], gl.NVMMASharedLayout(128, 16, 2))
    first, second = (torch.zeros(2, 64, dtype=torch.bfloat16) for _ in range(2))
    checked, quick = box.of(first), box.at(second)
    assert type(quick) is type(checked)
    assert (checked.base is first, quick.base is second) == (True, True)
    assert {**vars(checked), "base": None} == {**vars(quick), "base": None}
    with pytest.raises(AssertionError, match="aligned"):
        box.of(torch.zeros(129, dtype=torch.bfloat16)[1:].view(2, 64))


def test_a_box_may_begin_within_a_tensor():
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="needs Gluon")
    from triton.experimental.gluon import language as gl

    from lintra.kernels._common.boxes import Box

    arguments = ([2, 64], [64, 1], [1, 64], gl.NVMMASharedLayout(128, 16, 2))
    box = Box(*arguments, offset=192)
    first, second = (torch.zeros(5, 64, dtype=torch.bfloat16) for _ in range(2))
    for tensor, made in ((first, box.of(first)), (second, box.at(second)), (first, box.at(first))):
        expected = Box(*arguments).of(tensor[3:])
        assert made.base.data_ptr() == tensor.data_ptr() + 384 == expected.base.data_ptr()
        assert {**vars(made), "base": None} == {**vars(expected), "base": None}
    assert box.of(first).base.dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="aligned"):
        Box(*arguments, offset=4).of(first)


def test_unaligned_pointers_take_the_ordinary_way(triton):
    kernel = Kernel()
    call = call_of(kernel)
    aligned, first_off = tensors(), tensors(1)
    for arguments in (first_off, first_off, aligned, aligned, (aligned[0], first_off[1]), aligned):
        call(*arguments)
    assert kernel.ways == ["triton", "triton", "triton", "direct", "triton", "direct"]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("plain", [False, True])
def test_profilers_see_every_launch(triton, name, plain):
    kernel, hooks = Kernel(), triton.knobs.runtime
    call = call_of(kernel)
    for _ in range(2):
        call(*tensors())
    before = getattr(hooks, name)
    setattr(hooks, name, print if plain else SimpleNamespace(calls=[print]))
    call(*tensors())
    setattr(hooks, name, None if plain else before)
    call(*tensors())
    assert kernel.ways == ["triton", "direct", "triton", "direct"]


def test_releases_that_are_not_known_launch_by_themselves(triton):
    triton.__version__ = "3.60.0"
    kernel = Kernel()
    call = call_of(kernel)
    for _ in range(3):
        call(*tensors())
    assert kernel.ways == ["triton"] * 3


def test_what_cannot_be_launched_directly(triton, monkeypatch):
    interpreted, defaults, amd = Kernel(compiles=False), Kernel(), Kernel()
    other = Kernel()
    other.packed_metadata = None
    calls = [call_of(interpreted), call_of(defaults, {"BLOCK": 64}), call_of(other)]
    for call in calls * 2:
        call(*tensors())
    monkeypatch.setattr(torch.version, "hip", "7.0")
    call = call_of(amd)
    for _ in range(2):
        call(*tensors())
    for kernel in (interpreted, defaults, other, amd):
        assert kernel.ways == ["triton"] * 2


def inputs(dtype: torch.dtype = torch.bfloat16, offset: int = 0) -> list[Tensor]:
    """Query, key and value of 7 x 7 tokens, `offset` elements after the start of their memory."""
    size = 3 * 2 * 49 * 3 * 32
    memory = torch.randn(size + offset, device="cuda").to(dtype)[offset:]
    return list(memory.view(3, 2, 49, 3, 32).unbind())


def operations(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """What both operations give, and the gradients."""
    weight = torch.linspace(-1, 1, 96 * 25, device="cuda").view(96, 5, 5).to(query.dtype)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = linear_attention(*leaves, impl="triton")
    out = token_conv2d(leaves[2].flatten(2), weight, grid=(7, 7), residual=out.flatten(2))
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]


def ordinary(monkeypatch: pytest.MonkeyPatch, *tensors: Tensor) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_watched", lambda: True)
        return operations(*tensors)


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_direct_launches_equal_ordinary_ones(monkeypatch, dtype):
    operations(*inputs(dtype))
    for offset in (0, 1, 8, 0):
        tensors = inputs(dtype, offset)
        assert_equal(operations(*tensors), ordinary(monkeypatch, *tensors))


@pytest.mark.gpu
def test_other_streams(monkeypatch):
    tensors = inputs()
    expected = ordinary(monkeypatch, *tensors)
    for _ in range(3):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)  # what runs beside it would be done first
            fresh = [x * 1 for x in tensors]
            got = operations(*fresh)
        torch.cuda.current_stream().wait_stream(stream)
        assert_equal(got, expected)


@pytest.mark.gpu
def test_within_a_cuda_graph(monkeypatch):
    query, key, value = inputs()
    weight = torch.randn(96, 5, 5, device="cuda", dtype=query.dtype)

    def forward() -> Tensor:
        out = linear_attention(query, key, value, impl="triton").flatten(2)
        return token_conv2d(value.flatten(2), weight, grid=(7, 7), residual=out, impl="triton")

    with torch.no_grad():
        for _ in range(2):
            forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = forward()
        for x, fresh in zip((query, key, value), inputs(), strict=True):
            x.copy_(fresh)
        graph.replay()
        assert torch.equal(out, forward())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    tensors = [x.to("cuda:1") for x in inputs()]
    first = linear_attention(*tensors, impl="triton")
    assert torch.equal(linear_attention(*tensors, impl="triton"), first)
    assert torch.equal(linear_attention(*(x.cuda(0) for x in tensors), impl="triton").to(1), first)
