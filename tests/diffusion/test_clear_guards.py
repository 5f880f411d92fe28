"""What would bring full attention back, and other input that CLEAR's models refuse."""

from argparse import Namespace

import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)

from lintra.diffusion import assert_linear
from lintra.diffusion.attention.local import ClearAttnProcessor
from tiny_clear import CLEAR, STOCK, clear_inputs, tiny_clear, tiny_stock

both = pytest.mark.parametrize("family", ["flux", "sd3"])
OTHERS = {
    "flux": [FluxAttnProcessor(), FluxIPAdapterAttnProcessor(32, 12)],
    "sd3": [JointAttnProcessor2_0(), FusedJointAttnProcessor2_0()],
}


@both
def test_other_processors_are_refused(family):
    model = tiny_clear(family)
    mine = model.attn_processors
    for other in OTHERS[family]:
        message = f"`processor` must be a ClearAttnProcessor, got a {type(other).__name__}, which"
        with pytest.raises(ValueError, match=message):
            model.set_attn_processor(other)
        last = {**mine, list(mine)[-1]: other}
        with pytest.raises(ValueError, match=message):
            model.set_attn_processor(last)
    with pytest.raises(
        ValueError, match="got one with full_attention=True, down_factor=None where"
    ):
        model.set_attn_processor(ClearAttnProcessor(full_attention=True))
    with pytest.raises(ValueError, match="got one with full_attention=False, down_factor=2 where"):
        model.set_attn_processor({name: ClearAttnProcessor(2) for name in mine})
    with pytest.raises(ValueError, match=f"number of processors is {len(mine)}, got 1"):
        model.set_attn_processor({next(iter(mine)): ClearAttnProcessor()})
    assert all(model.attn_processors[name] is processor for name, processor in mine.items())
    assert_linear(model)


@both
def test_own_processors_are_accepted(family):
    model, inputs = tiny_clear(family), clear_inputs(family)
    expected = model(**inputs).sample
    processor = ClearAttnProcessor()
    model.set_attn_processor(processor)
    assert all(p is processor for p in model.attn_processors.values())
    assert torch.equal(model(**inputs).sample, expected)

    pooled = tiny_clear(family, down_factor=3)
    expected, mine = pooled(**inputs).sample, pooled.attn_processors
    pooled.set_attn_processor(mine)
    assert len(mine) == len(pooled.attn_processors)
    assert torch.equal(pooled(**inputs).sample, expected)
    with pytest.raises(ValueError, match="one object a layer with pooled keys, .* got 1 for"):
        pooled.set_attn_processor(ClearAttnProcessor(3))
    pooled.set_attn_processor({name: ClearAttnProcessor(3) for name in mine})
    assert not torch.equal(pooled(**inputs).sample, expected)


def _slice(attention):
    attention.set_attention_slice(1)


def _like_pag(attention):
    del attention.processor
    attention.processor = FluxAttnProcessor()


@pytest.mark.parametrize(("family", "replace"), [("sd3", _slice), ("flux", _like_pag)])
def test_processors_set_past_the_model_stop_it(family, replace):
    model = tiny_clear(family)
    attention = model.transformer_blocks[1].attn
    replace(attention)
    with pytest.raises(ValueError, match="`transformer_blocks.1.attn.processor` must be a Clear"):
        model(**clear_inputs(family))
    with pytest.raises(ValueError, match="got 1 of .* transformer_blocks.1.attn: it is"):
        assert_linear(model)
    attention.set_processor(ClearAttnProcessor())
    assert_linear(model)
    model(**clear_inputs(family))


@both
def test_undeclared_full_attention_is_found(family):
    model = tiny_clear(family)
    model.transformer_blocks[0].attn.set_processor(ClearAttnProcessor(full_attention=True))
    with pytest.raises(ValueError, match="blocks.0.attn: its processor attends fully, which"):
        assert_linear(model)
    with pytest.raises(ValueError, match="got .* of .* layers that do not: transformer_blocks.0"):
        assert_linear(tiny_stock(family))


@both
def test_ip_adapters_are_refused(family):
    model = tiny_clear(family)
    with pytest.raises(NotImplementedError, match="IP-Adapters replace .* into a Clear"):
        model._load_ip_adapter_weights([{"image_proj": {}, "ip_adapter": {}}])
    assert_linear(model)


@both
@pytest.mark.parametrize(
    "config", [ContextParallelConfig(ring_degree=2), Namespace(context_parallel_config=object())]
)
def test_context_parallelism_is_refused(family, config):
    model = tiny_clear(family)
    with pytest.raises(NotImplementedError, match="`config` must not ask for context parallelism"):
        model.enable_parallelism(config=config)
    assert model._parallel_config is None


@both
@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"radius": "8"}, TypeError, "`radius` must be a number, got str"),
        ({"radius": True}, TypeError, "`radius` must be a number, got bool"),
        ({"radius": 0.5}, ValueError, "`radius` must be at least 1, got 0.5"),
        ({"radius": float("nan")}, ValueError, "`radius` must be at least 1, got nan"),
        ({"down_factor": 2.0}, TypeError, "`down_factor` must be an integer or None, got float"),
        ({"down_factor": 1}, ValueError, "`down_factor` must be at least 2, or None, got 1"),
        ({"ntk_factor": "10"}, TypeError, "`ntk_factor` must be a number, got str"),
        ({"ntk_factor": 0}, ValueError, "`ntk_factor` must be positive, got 0"),
        ({"full_attention_layers": [9]}, ValueError, r"`full_attention_layers` must be .*, got 9"),
        ({"full_attention_layers": [-1]}, ValueError, r"must be in 0 \.\. ., got -1"),
        ({"full_attention_layers": ["a"]}, ValueError, r"must be in 0 \.\. ., got 'a'"),
        ({"full_attention_layers": 3}, TypeError, "`full_attention_layers` must be .* got int"),
        ({"proportional_scale": "no"}, TypeError, "`proportional_scale` must be a bool, got str"),
    ],
)
def test_configurations_are_checked(family, config, error, message):
    with pytest.raises(error, match=message):
        CLEAR[family](**{**STOCK[family][1], **config})


@both
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"radius": "8"}, TypeError, "`radius` must be a number, got str"),
        ({"ntk_factor": None}, TypeError, "`ntk_factor` must be a number, got NoneType"),
        ({"proportional_scale": 1}, TypeError, "`proportional_scale` must be a bool, got int"),
        ({"spatial_shape": (9, 11)}, ValueError, "must hold the 108 image tokens, got 9 x 11"),
        ({"spatial_shape": 9}, ValueError, r"`spatial_shape` must be two .* sides .*, got 9"),
        ({"spatial_shape": (9.0, 12)}, ValueError, "must be two positive sides"),
        ({"attention_mask": torch.ones(2, 2)}, ValueError, "`attention_mask` must be None"),
    ],
)
def test_calls_are_checked(family, kwargs, error, message):
    with pytest.raises(error, match=message):
        tiny_clear(family)(**clear_inputs(family), joint_attention_kwargs=kwargs)


@both
def test_the_down_factor_must_divide_the_grid(family):
    with pytest.raises(ValueError, match="sides that the down factor 4 divides, got 9 x 12"):
        tiny_clear(family, down_factor=4)(**clear_inputs(family, (9, 12)))


@both
def test_a_single_file_has_no_pooling_kernels(family):
    with pytest.raises(NotImplementedError, match="`down_factor` must be None .* got 4: give"):
        CLEAR[family].from_single_file("none.safetensors", down_factor=4)


def test_flux_errors():
    model, inputs = tiny_clear("flux"), clear_inputs("flux")
    with pytest.raises(ValueError, match="`img_ids` must number a grid row by row, got 108 ids"):
        model(**{**inputs, "img_ids": torch.randn(108, 3)})
    with pytest.raises(ValueError, match="must hold the 108 image tokens, got 8 x 12"):
        model(**{**inputs, "img_ids": inputs["img_ids"][:96]})
    with pytest.raises(ValueError, match="`img_ids` and `txt_ids` must be tensors"):
        model(**{**inputs, "img_ids": None})
    batched = {**inputs, "img_ids": inputs["img_ids"][None], "txt_ids": inputs["txt_ids"][None]}
    assert torch.equal(model(**batched).sample, model(**inputs).sample)


def test_sd3_errors():
    model, inputs = tiny_clear("sd3"), clear_inputs("sd3")
    with pytest.raises(ValueError, match="`hidden_states` must have .* patch size 2 .* 18 x 23"):
        model(**{**inputs, "hidden_states": inputs["hidden_states"][..., :-1]})
    with pytest.raises(ValueError, match=r"`spatial_shape` must be that .* \(9, 12\), got \(12, 9"):
        model(**inputs, joint_attention_kwargs={"spatial_shape": (12, 9)})
    with pytest.raises(ValueError, match="`ntk_factor` must be 1, got 10: SD3 has no rotary"):
        model(**inputs, joint_attention_kwargs={"ntk_factor": 10})
    with pytest.raises(ValueError, match="`ntk_factor` must be 1, got 10: SD3 has no rotary"):
        tiny_clear("sd3", ntk_factor=10)


@both
def test_from_teacher_errors(family):
    cls = CLEAR[family]
    with pytest.raises(ValueError, match=r"`overrides` must be arguments of Clear.*\['window'\]"):
        cls.from_teacher(tiny_stock(family), window=3)
    other = "sd3" if family == "flux" else "flux"
    with pytest.raises(ValueError, match="`teacher` must have a configuration that Clear.* takes"):
        cls.from_teacher(tiny_stock(other))
    fused = tiny_stock(family)
    fused.fuse_qkv_projections()
    with pytest.raises(ValueError, match="`teacher` must hold the .* the student has no .*to_qkv"):
        cls.from_teacher(fused)
    with pytest.raises(ValueError, match="`teacher` must hold .* is missing"):
        cls.from_teacher(tiny_stock(family), num_layers=4)
    with pytest.raises(ValueError, match=r"`teacher` must hold .* is \(.*\), not \("):
        cls.from_teacher(tiny_stock(family), joint_attention_dim=13)
    with pytest.raises(ValueError, match="`teacher` must hold .* is not loaded"):
        cls.from_teacher(tiny_stock(family).to("meta"))
