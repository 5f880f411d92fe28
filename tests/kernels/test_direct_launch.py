"""Triton's launcher is left out only where C gets from us what it would get from it."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lintra.kernels import linear_attention
from lintra.kernels._common.launch import architecture

kernel_call = pytest.importorskip("lintra.kernels._common.kernel_call", reason="needs triton")
direct_launch = pytest.importorskip("lintra.kernels._common.direct_launch")
nvidia = pytest.importorskip("triton.backends.nvidia.driver", reason="needs Triton for NVIDIA")
pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="needs Gluon")

GRID, REST = (5, 2, 1), (9, 0.5, None, 64)
# Boxes: of which tensor, how many rows of it are one block, elements before it.
KINDS = {"a": (0, 1, 0), "b": (1, 2, 0), "c": (0, 1, 64)}
FOUND = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "fp4_padded": False}


class C:
    """The functions in C that Triton calls; keeps what they get."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.maps: list[tuple[Any, ...]] = []

    def launch(self, *arguments: Any) -> None:
        *before, last = arguments
        # A list and a tuple are alike to C.
        self.launches.append((*before, tuple(last) if isinstance(last, list | tuple) else last))

    def fill(self, *arguments: Any) -> tuple[Any, ...]:
        self.maps.append(arguments)
        return ("map", *arguments)


@pytest.fixture
def c(monkeypatch: pytest.MonkeyPatch) -> C:
    if kernel_call.triton.__version__.rsplit(".", 1)[0] not in kernel_call._RELEASES:
        pytest.skip("another Triton, whose launcher is called")
    made = C()
    utils = SimpleNamespace(
        launch=made.launch,
        fill_tma_descriptor=made.fill,
        fill_tma_descriptor_tiled=made.fill,
        build_signature_metadata=bytes,
    )
    active = SimpleNamespace(utils=utils)
    runtime = SimpleNamespace(driver=SimpleNamespace(active=active))
    monkeypatch.setattr(nvidia, "triton", SimpleNamespace(runtime=runtime))
    # Triton 3.6 compiles a function for each signature, later ones annotate the arguments.
    module = SimpleNamespace(launch=made.launch)
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: module, raising=False)
    monkeypatch.setattr(nvidia, "make_kernel_signature", tuple, raising=False)
    monkeypatch.setattr(nvidia, "PyKernelArg", SimpleNamespace, raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", list)
    return made


class Case:
    """A kernel of two pointers, and with `kinds` of boxes of two more tensors; and its launch."""

    def __init__(self, c: C, kinds: str, spoil: Callable[[Any], None] = lambda _: None) -> None:
        from triton.experimental.gluon import language as gl

        from lintra.kernels._common.boxes import Box

        self.c, self.stream = c, 11
        self.only_boxes = 2 if kinds else 0
        layout = gl.NVMMASharedLayout(128, 16, 2)
        self.boxes, types, found = [], {}, []
        for index, rows, offset in (KINDS[kind] for kind in kinds):
            self.boxes.append((index, Box([2, 64], [64, 1], [rows, 64], layout, offset)))
            types[f"d{len(types)}"] = f"tensordesc<bf16[{rows}, 64],{layout!r}>"
            found.append({**FOUND, "block_size": [rows, 64]})
        numbers = {"n": "i32", "x": "fp32", "p": "constexpr", "B": "constexpr"}
        signature = {**types, "o": "*bf16", "l": "*fp32", **numbers}
        self.compiled = SimpleNamespace(
            function=77,
            packed_metadata=(4, 1, 0),
            src=SimpleNamespace(signature=signature, constants={}),
            metadata=SimpleNamespace(
                tensordesc_meta=found,
                num_ctas=1,
                global_scratch_size=0,
                global_scratch_align=1,
                profile_scratch_size=0,
                profile_scratch_align=1,
                launch_cooperative_grid=False,
                launch_pdl=True,
            ),
        )
        self.compiled.run = nvidia.CudaLauncher(self.compiled.src, self.compiled.metadata)
        spoil(self.compiled)
        driver = SimpleNamespace(
            get_current_device=lambda: 3, get_current_stream=lambda device: (device, self.stream)
        )
        self.direct = direct_launch.DirectLaunch(
            self.compiled, GRID, driver, self.boxes, self.only_boxes, REST
        )

    def tensors(self) -> list[Tensor]:
        return [torch.zeros(3, 64, dtype=torch.bfloat16) for _ in range(self.only_boxes + 2)]

    def both(self, tensors: list[Tensor]) -> tuple[Any, Any, int]:
        """What C gets from Triton and from us, and how many maps we had made."""
        pointers = [x.data_ptr() for x in tensors]
        ordinary = [box.of(tensors[i]) for i, box in self.boxes]
        before = (self.compiled.function, self.compiled.packed_metadata, None, None, None)
        arguments = (*ordinary, *pointers[self.only_boxes :], *REST)
        self.compiled.run(*GRID, (3, self.stream), *before, *arguments)
        count = len(self.c.maps)
        self.direct(tensors, pointers)
        return (*self.c.launches[-2:], len(self.c.maps) - count)


@pytest.mark.parametrize("kinds", ["", "a", "aabb", "abacb"])
def test_c_gets_what_triton_would_give(c, kinds):
    case = Case(c, kinds)
    first, second = case.tensors(), case.tensors()
    mixed = [first[0], *second[1:]]
    made = []
    for tensors in (first, second, mixed, first):
        case.stream += 1  # the current one of the time
        expected, got, maps = case.both(tensors)
        assert got == expected
        made.append(maps)
    # Each address is described once.
    assert made == [len(kinds), len(kinds), 0, 0]


def test_no_more_python_of_tritons(c, monkeypatch):
    case = Case(c, "ab")
    tensors = case.tensors()
    expected, *_ = case.both(tensors)

    def fails(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(nvidia.CudaLauncher, "__call__", fails)
    monkeypatch.setattr(nvidia, "make_tensordesc_arg", fails)
    case.direct(tensors, [x.data_ptr() for x in tensors])
    assert c.launches[-1] == expected


class Launcher(nvidia.CudaLauncher):
    """Another's."""


def scratch(compiled: Any) -> None:
    compiled.run.global_scratch_size = 8


def sanitizer(compiled: Any) -> None:
    compiled.run.gsan_enabled = None
    compiled.run.profile_scratch_size = 8


def subclass(compiled: Any) -> None:
    compiled.run.__class__ = Launcher


def wrapped(compiled: Any) -> None:
    launcher = compiled.run.launch
    compiled.run.launch = lambda *arguments: launcher(*arguments)


def fewer(compiled: Any) -> None:
    compiled.metadata.tensordesc_meta = compiled.metadata.tensordesc_meta[1:]


def unnamed(compiled: Any) -> None:
    del compiled.metadata.tensordesc_meta


@pytest.mark.parametrize("spoil", [scratch, sanitizer, subclass, wrapped, fewer, unnamed])
def test_other_launchers_are_called(c, monkeypatch, spoil):
    allocator = SimpleNamespace(get=lambda: lambda *given: given)
    made = SimpleNamespace(
        _allocator=allocator, _profile_allocator=allocator, has_profile_allocator=lambda: True
    )
    monkeypatch.setattr(nvidia, "_allocation", made)
    case = Case(c, "ab", spoil)
    tensors = case.tensors()
    for _ in range(2):
        expected, got, maps = case.both(tensors)
        assert got == expected
        assert maps == 2


def test_few_addresses_are_kept(c, monkeypatch):
    monkeypatch.setattr(direct_launch, "_ADDRESSES", 2)
    case = Case(c, "aa")
    some = [case.tensors() for _ in range(3)]
    made = []
    for i in (0, 1, 0, 1, 2, 2, 0, 1, 0):
        expected, got, maps = case.both(some[i])
        assert got == expected
        made.append(maps)
    assert made == [2, 2, 0, 0, 2, 0, 2, 2, 2]


def test_no_memory_is_kept(c):
    case = Case(c, "abc")
    tensors = case.tensors()
    case.direct(tensors, [x.data_ptr() for x in tensors])
    alive = [weakref.ref(x) for x in tensors]
    del tensors
    gc.collect()
    assert not any(x() is not None for x in alive)


def operations(tensors: list[Tensor], normalizer: str) -> list[Tensor]:
    """What kernels with boxes give on Hopper, and the gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = linear_attention(*leaves, normalizer=normalizer, impl="triton")
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]


def inputs(tokens: int, offset: int = 0) -> list[Tensor]:
    size = 3 * 2 * tokens * 2 * 192
    memory = torch.randn(size + offset, device="cuda").bfloat16()[offset:]
    return list(memory.view(3, 2, tokens, 2, 192).unbind())


@pytest.mark.gpu
@pytest.mark.parametrize("normalizer", ["ratio", "covariance"])
@pytest.mark.parametrize("tokens", [128, 1000])
def test_kernels_for_hopper(monkeypatch, tokens, normalizer):
    if architecture(0) != 90:
        pytest.skip("needs a Hopper GPU")
    operations(inputs(tokens), normalizer)
    calls, launched = [], nvidia.CudaLauncher.__call__

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        launched(*arguments)

    monkeypatch.setattr(nvidia.CudaLauncher, "__call__", counted)
    for offset in (0, 8, 64, 0):
        tensors = inputs(tokens, offset)
        with monkeypatch.context() as patch:
            patch.setattr(kernel_call, "_watched", lambda: True)
            expected = operations(tensors, normalizer)
        assert calls
        calls.clear()
        for _ in range(2):
            got = operations(tensors, normalizer)
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        assert not calls


@pytest.mark.gpu
def test_kernels_for_hopper_within_a_cuda_graph():
    if architecture(0) != 90:
        pytest.skip("needs a Hopper GPU")
    tensors, fresh = inputs(1000), inputs(1000)
    with torch.no_grad():
        for _ in range(2):
            linear_attention(*tensors, impl="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear_attention(*tensors, impl="triton")
        # Addresses that come after the capture: more than are kept.
        for _ in range(direct_launch._ADDRESSES + 1):
            tensors.append(linear_attention(*fresh, impl="triton"))
        for x, y in zip(tensors, fresh, strict=False):
            x.copy_(y)
        graph.replay()
        assert torch.equal(out, linear_attention(*tensors[:3], impl="triton"))
