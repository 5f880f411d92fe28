"""SLA and InLine against the official modules, and their own contract."""

import pytest
import torch

from golden_vision import group, load_vision, relative_error
from lintra.vision.attention import InLineAttention, LinearMixer, SimplifiedLinearAttention

TOLERANCE = 1e-6
MIXERS = {"sla": SimplifiedLinearAttention, "inline": InLineAttention}


def build(name: str) -> tuple[LinearMixer, dict, dict[str, torch.Tensor]]:
    """The mixer of one stored case, in float64, with its parameters loaded."""
    description, case = load_vision(name)
    method, family = name.split("_")[1:3]
    settings = description["constructor"]
    options = {}
    if family == "pvt":
        options = {"fused_qkv": False, "sr_ratio": settings["sr_ratio"]}
        if settings["sr_ratio"] > 1:
            options["norm_layer"] = torch.nn.LayerNorm
    if family == "cswin":
        options["lepe"] = True
        if method == "inline":
            options["raw_context"] = True
    if method == "inline":
        options["num_prefix_tokens"] = 1 if family == "deit" else 0
        options["kernel_func"] = settings.get("kernel_func", "identity")
    mixer = MIXERS[method](
        settings["dim"], settings["num_heads"], grid=description["grid"], **options
    ).double()
    state = {
        key.replace("get_v.", "lepe."): value.double()
        for key, value in group(case, "param/").items()
        if key != "scale"
    }
    if family == "cswin":  # the official modules get the projected tokens
        mine = mixer.state_dict()
        state |= {k: v for k, v in mine.items() if k.startswith(("qkv.", "proj."))}
    mixer.load_state_dict(state)
    return mixer, description, case


CASES = [
    "op_inline_deit", "op_inline_pvt", "op_inline_swin", "op_inline_swin_exp",
    "op_inline_swin_leakyrelu", "op_inline_swin_relu", "op_sla_deit", "op_sla_deit_eps",
    "op_sla_pvt", "op_sla_pvt_sr2", "op_sla_swin",
]  # fmt: skip


def check_gradients(mixer: LinearMixer, case: dict[str, torch.Tensor]) -> None:
    parameters = dict(mixer.named_parameters())
    for name, value in group(case, "grad/param/").items():
        name = name.replace("get_v.", "lepe.")
        assert relative_error(parameters[name].grad, value) < TOLERANCE, name


@pytest.mark.parametrize("name", CASES)
def test_equals_official(name: str) -> None:
    mixer, _, case = build(name)
    x = case["in/x"].double().requires_grad_()
    out = mixer(x)
    out.backward(case["cotangent"].double())
    assert relative_error(out, case["out"]) < TOLERANCE
    assert relative_error(x.grad, case["grad/in/x"]) < TOLERANCE
    check_gradients(mixer, case)


@pytest.mark.parametrize("name", ["op_inline_cswin", "op_sla_cswin"])
def test_cswin_core_equals_official(name: str) -> None:
    mixer, description, case = build(name)
    inputs = {k: v.double().requires_grad_() for k, v in group(case, "in/").items()}
    q, k, v = (mixer._parts(x, 1)[0] for x in inputs["qkv"])
    mean = inputs.get("x_mean", torch.zeros(2, mixer.dim))
    out = mixer.mix(q, k, v, mean, tuple(description["grid"]))
    out.backward(case["cotangent"].double())
    assert relative_error(out, case["out"]) < TOLERANCE
    for key, value in inputs.items():
        assert relative_error(value.grad, case[f"grad/in/{key}"]) < TOLERANCE
    check_gradients(mixer, case)


@pytest.mark.parametrize("method", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_prefix_tokens": 1}, {"lepe": True}, {"fused_qkv": False}],
    ids=["plain", "class_token", "lepe", "pvt"],
)
def test_any_grid_batch_and_dtype(method: str, dtype: torch.dtype, options: dict) -> None:
    mixer = MIXERS[method](12, 3, grid=(4, 4), dtype=dtype, **options)
    prefix = options.get("num_prefix_tokens", 0)
    for batch, grid in [(1, (4, 4)), (3, (2, 7)), (2, (1, 1))]:
        x = torch.randn(batch, prefix + grid[0] * grid[1], 12, dtype=dtype, requires_grad=True)
        out = mixer(8 * x, grid)
        out.sum().backward()
        assert out.shape == x.shape
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("method", MIXERS)
def test_autocast_is_finite_and_close(method: str) -> None:
    mixer = MIXERS[method](32, 2, grid=(8, 8))
    x = torch.randn(2, 64, 32)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(x)
    assert relative_error(out, expected) < 0.05


@pytest.mark.parametrize("method", MIXERS)
def test_an_empty_batch_stays_empty(method: str) -> None:
    assert MIXERS[method](12, 3, grid=(2, 3))(torch.randn(0, 6, 12)).shape == (0, 6, 12)


def test_autocast_lowers_the_dynamic_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    mixer = InLineAttention(8, 2, grid=(2, 3))
    monkeypatch.setattr(
        mixer, "local_kernel", lambda mean: made.append(mean) or (torch.ones(8, 3, 3), None)
    )
    with torch.autocast("cpu", torch.bfloat16):
        mixer(torch.randn(2, 6, 8))
    assert made[0].dtype == torch.bfloat16


@pytest.mark.parametrize("method", MIXERS)
@torch.no_grad()
def test_another_attention_is_called(method: str) -> None:
    class Silent(MIXERS[method]):
        def attend(self, q, k, v, grid):
            return torch.zeros_like(v)

    usual, silent = MIXERS[method](12, 3, grid=(2, 3)), Silent(12, 3, grid=(2, 3))
    silent.load_state_dict(usual.state_dict())
    x = torch.randn(2, 6, 12)
    out = silent(x)
    assert not torch.allclose(out, usual(x))
    usual.attend = lambda q, k, v, grid: torch.zeros_like(v)
    assert torch.equal(out, usual(x))


def test_dead_queries_are_finite_in_half_precision() -> None:
    mixer = SimplifiedLinearAttention(8, 1, grid=(2, 2), dtype=torch.float16)
    with torch.no_grad():
        mixer.qkv.weight.zero_()
        mixer.qkv.bias.fill_(-1)
    assert mixer(torch.randn(1, 4, 8, dtype=torch.float16)).isfinite().all()


def test_position_table_is_resized() -> None:
    mixer = SimplifiedLinearAttention(6, 2, grid=(4, 4))
    torch.nn.init.normal_(mixer.positional_encoding)
    x = torch.randn(2, 15, 6)
    expected = mixer(x, (3, 5))
    mixer.set_input_size((3, 5))
    assert mixer.positional_encoding.shape == (1, 15, 6)
    assert mixer.grid == (3, 5)
    torch.testing.assert_close(mixer(x), expected)


def test_state_dict_names_are_public() -> None:
    projections = ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    sla = SimplifiedLinearAttention(8, 2, grid=(2, 2), lepe=True).state_dict()
    assert {k: tuple(v.shape) for k, v in sla.items() if k not in projections} == {
        "positional_encoding": (1, 4, 8),
        "dwc.weight": (4, 1, 5, 5),
        "dwc.bias": (4,),
        "lepe.weight": (8, 1, 3, 3),
        "lepe.bias": (8,),
    }
    inline = InLineAttention(8, 2, grid=(2, 2)).state_dict()
    assert {k: tuple(v.shape) for k, v in inline.items() if k not in projections} == {
        "residual.0.weight": (8, 4, 1),
        "residual.0.bias": (8,),
        "residual.2.weight": (72, 4, 1),
        "residual.2.bias": (72,),
    }


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: InLineAttention(8, 3, grid=(2, 2)), r"`dim` must be a multiple of num_heads 3"),
        (lambda: InLineAttention(8, 2, grid=(2, 2), sr_ratio=2), r"`sr_ratio` must be 1 for InL"),
        (
            lambda: InLineAttention(8, 2, grid=(2, 2), kernel_func="gelu"),
            r"`kernel_func` must be one of identity, relu, leakyrelu, exp, got 'gelu'",
        ),
        (
            lambda: InLineAttention(8, 2, grid=(2, 2))(torch.randn(1, 5, 8)),
            r"`grid` must hold the 5 tokens, got 2 x 2",
        ),
    ],
)
def test_errors(function, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function()


def test_torch_jit_script_is_refused_clearly() -> None:
    with pytest.raises(NotImplementedError, match=r"must not be compiled with torch.jit.script"):
        torch.jit.script(InLineAttention(8, 2, grid=(2, 2)))
