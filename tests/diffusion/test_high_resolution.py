"""The cascade: what its stages run, that it resumes, and what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from PIL import Image
from safetensors.torch import save_file

from lintra.diffusion import swap_transformer
from lintra.diffusion.cascade_plan import Stage, plan_stages
from lintra.diffusion.clear_weights import clear_parameter_names
from lintra.diffusion.high_resolution import encode_prompt, generate_cascade
from lintra.tools import convert as convert_tool
from lintra.tools import sample as tool
from tiny_clear import CLEAR, prompt_embeddings, tiny_clear, tiny_clear_pipeline, tiny_stock
from tiny_models import tiny_lit, tiny_pipeline

both = pytest.mark.parametrize("family", ["flux", "sd3"])
SIZES = [(16, 24), (32, 48), (48, 72)]


def cascade(family, **changes):
    """A pipeline with a local student of its stock transformer, and that teacher."""
    pipeline = tiny_clear_pipeline(family, tiny_stock(family))
    teacher = pipeline.transformer
    changes = {"radius": 3, "down_factor": 2, **changes}
    swap_transformer(pipeline, CLEAR[family].from_teacher(teacher, **changes))
    return pipeline, teacher


def plan(pipeline, sizes=SIZES, **changes):
    changes = {"num_inference_steps": 2, "teacher_stages": 1, **changes}
    return plan_stages(pipeline, sizes, **changes)


def assert_same(image, expected):
    """But for a rounding of the last bit: small products depend on the alignment of memory."""
    assert image.size == expected.size
    difference = np.asarray(image).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).max() <= 1


def record_calls(monkeypatch, model, calls):
    forward = model.forward

    def spy(*args, **kwargs):
        calls.append((type(model).__name__, kwargs))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)


@both
def test_stages_are_the_stock_pipelines(family):
    """The same images as text to image and image to image called by hand."""
    pipeline, teacher = cascade(family)
    stages = plan(pipeline, SIZES[:2], guidance_scale=[3.0, 5.0], strength=0.6)
    stages[1] = dataclasses.replace(stages[1], proportional_scale=True)
    images = generate_cascade(
        pipeline, prompt_embeddings(family), stages, teacher=teacher, seed=4, vae_tiling=False
    )

    common = {"num_inference_steps": 2, **prompt_embeddings(family)}
    by_hand = tiny_clear_pipeline(family, teacher)
    first = by_hand(
        height=16,
        width=24,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4),
        **common,
    ).images[0]
    assert_same(images[0], first)
    cls = FluxImg2ImgPipeline if family == "flux" else StableDiffusion3Img2ImgPipeline
    parts = {"image_encoder", "feature_extractor"}
    components = {k: v for k, v in pipeline.components.items() if k not in parts}
    scheduler = type(pipeline.scheduler)(shift=3.0)
    second = cls(**{**components, "scheduler": scheduler})
    second.set_progress_bar_config(disable=True)
    expected = second(
        image=first.resize((48, 32), Image.Resampling.LANCZOS),
        height=32,
        width=48,
        strength=0.6,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(5),
        joint_attention_kwargs={"proportional_scale": True},
        **common,
    ).images[0]
    assert_same(images[1], expected)
    assert [image.size for image in images] == [(24, 16), (48, 32)]


def test_the_published_schedule(monkeypatch):
    """20 steps at strength .7 are 14 from a sigma of .875; NTK and scale go to the student only."""
    pipeline, teacher = cascade("flux")
    pipeline.register_modules(
        scheduler=type(pipeline.scheduler)(shift=3.0, use_dynamic_shifting=True)
    )
    stages = plan(pipeline, [(16, 16), (260, 272)], num_inference_steps=[1, 20])
    assert [stage.guidance_scale for stage in stages] == [3.5, 7.5]
    assert [(stage.ntk_factor, stage.proportional_scale) for stage in stages] == [
        (1.0, False),
        (10.0, True),
    ]
    assert [stage.shift for stage in stages] == [None, 3.0]
    stages[1] = dataclasses.replace(stages[1], height=32, width=32)
    calls = []
    for model in (teacher, pipeline.transformer):
        record_calls(monkeypatch, model, calls)
    generate_cascade(pipeline, prompt_embeddings("flux"), stages, teacher=teacher)
    names = [name for name, _ in calls]
    assert names == ["FluxTransformer2DModel"] + ["ClearFluxTransformer2DModel"] * 14
    assert calls[1][1]["timestep"].item() == pytest.approx(0.875)
    assert calls[1][1]["guidance"].item() == 7.5
    assert calls[0][1]["joint_attention_kwargs"] == {}
    assert calls[1][1]["joint_attention_kwargs"] == {"ntk_factor": 10.0, "proportional_scale": True}
    assert pipeline.scheduler.config.use_dynamic_shifting
    assert not pipeline.vae.use_tiling


@both
def test_it_goes_on_where_it_stopped(family, tmp_path, monkeypatch):
    pipeline, teacher = cascade(family)
    stages = plan(pipeline)
    whole = generate_cascade(pipeline, prompt_embeddings(family), stages, teacher=teacher)
    lines = []

    def stop_at_the_third(line):
        lines.append(line)
        if line.startswith("stage 3"):
            raise KeyboardInterrupt

    def run(say=lines.append, **changes):
        arguments = {"teacher": teacher, "output_dir": tmp_path, "say": say, **changes}
        return generate_cascade(pipeline, prompt_embeddings(family), stages, **arguments)

    with pytest.raises(KeyboardInterrupt):
        run(stop_at_the_third)
    names = ["stage1_24x16.png", "stage2_48x32.png", "stage3_72x48.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names[:2]
    times = [(tmp_path / name).stat().st_mtime_ns for name in names[:2]]
    calls = []
    for model in (teacher, pipeline.transformer):
        record_calls(monkeypatch, model, calls)
    again = run()
    assert len(calls) == 2  # of the third stage, as int(2 (1 - .7)) = 0 steps are left out
    assert [(tmp_path / name).stat().st_mtime_ns for name in names[:2]] == times
    for image, expected in zip(again, whole, strict=True):
        assert_same(image, expected)
    run()
    assert len(calls) == 2
    assert lines.count(f"{tmp_path / names[2]}: taken from an earlier run") == 1

    message = (
        "`output_dir` must hold images of this cascade only, got .*stage1_24x16.png of another"
    )
    with pytest.raises(ValueError, match=message):
        run(seed=1)
    other = {name: value + 1 for name, value in prompt_embeddings(family).items()}
    with pytest.raises(ValueError, match=message):
        generate_cascade(pipeline, other, stages, teacher=teacher, output_dir=tmp_path)
    stages[2] = dataclasses.replace(stages[2], strength=0.5)
    with pytest.raises(ValueError, match="got .*stage3_72x48.png of another prompt"):
        run()
    stages[2] = dataclasses.replace(stages[2], strength=0.7)
    with torch.no_grad():
        next(pipeline.transformer.parameters()).add_(1)  # which the teacher shares
    with pytest.raises(ValueError, match=message):
        run()
    (tmp_path / names[0]).write_bytes(b"no image")
    with pytest.raises(ValueError, match="`output_dir` must hold whole images, got .*stage1"):
        run()


def test_from_an_image():
    pipeline, _ = cascade("flux")
    stages = plan(pipeline, [(32, 48)], teacher_stages=0, strength=1.0)
    images = [
        generate_cascade(pipeline, prompt_embeddings("flux"), stages, image=image)[0]
        for image in (None, Image.new("RGB", (24, 16), "red"))
    ]
    assert images[0].size == images[1].size == (48, 32)


class Encoder(torch.nn.Identity):
    device, dtype = torch.device("cpu"), torch.float32


def test_text_is_encoded_once(monkeypatch):
    pipeline, teacher = cascade("sd3")
    embeds = prompt_embeddings("sd3")
    order = ("prompt_embeds", "negative_prompt_embeds")
    order += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    texts = []

    def encode(prompt, negative_prompt=None, **others):
        assert set(others) == {"prompt_2", "prompt_3"}
        texts.append((prompt, negative_prompt))
        return tuple(embeds[name] for name in order)

    monkeypatch.setattr(pipeline, "text_encoder", Encoder())
    monkeypatch.setattr(pipeline, "encode_prompt", encode)
    assert set(encode_prompt(pipeline, "a cat", "a dog")) == set(embeds)
    stages = plan(pipeline, SIZES[:1])
    generate_cascade(pipeline, "a cat", stages, teacher=teacher, negative_prompt="dull")
    assert texts == [("a cat", "a dog"), ("a cat", "dull")]


def test_offloading(monkeypatch):
    """Each stage's pipeline has its own hooks, and none are left behind."""
    pipeline, teacher = cascade("flux")
    events = []
    for name in ("enable_model_cpu_offload", "remove_all_hooks"):
        monkeypatch.setattr(
            DiffusionPipeline,
            name,
            lambda self, name=name, **words: events.append(
                (name, type(self).__name__, type(self.transformer).__name__, words)
            ),
        )
    stages = plan(pipeline, SIZES[:2])
    generate_cascade(
        pipeline, prompt_embeddings("flux"), stages, teacher=teacher, offload_device="cuda:1"
    )
    starts = [event[1:] for event in events if event[0] == "enable_model_cpu_offload"]
    assert starts == [
        ("FluxPipeline", "FluxTransformer2DModel", {"device": "cuda:1"}),
        ("FluxImg2ImgPipeline", "ClearFluxTransformer2DModel", {"device": "cuda:1"}),
    ]
    assert events[-1][0] == "remove_all_hooks"


def change(**changes):
    return lambda stages: [*stages[:1], dataclasses.replace(stages[1], **changes), *stages[2:]]


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda stages: [], "`stages` must hold at least one, got none"),
        (change(width=50), "`width` of stage 2 must be a positive multiple of 8, got 50"),
        (change(height=36), "`height` of stage 2 must be a positive multiple of 8, got 36"),
        (change(height=0), "`height` of stage 2 must be a positive multiple of 8, got 0"),
        (lambda stages: stages[::-1], "`stages` must grow, got 72x48, then 48x32 in stage 2"),
        (change(width=24), "`stages` must grow, got 24x16, then 24x32 in stage 2"),
        (change(strength=0.0), r"`strength` of stage 2 must be in \(0, 1\], got 0.0"),
        (change(strength=1.1), r"`strength` of stage 2 must be in \(0, 1\], got 1.1"),
        (change(num_inference_steps=0), "`num_inference_steps` of stage 2 must be at least 1"),
        (change(shift=0.0), "`shift` of stage 2 must be positive or None, got 0.0"),
        (change(use_teacher=True, ntk_factor=10.0), "of stage 2 must be 1 and False for a Flux"),
    ],
)
def test_stages_are_checked(alter, message, monkeypatch):
    pipeline, teacher = cascade("flux")
    monkeypatch.setattr(teacher, "forward", lambda *_, **__: pytest.fail("work was started"))
    with pytest.raises(ValueError, match=message):
        generate_cascade(
            pipeline, prompt_embeddings("flux"), alter(plan(pipeline)), teacher=teacher
        )


def test_other_input_is_checked():
    pipeline, teacher = cascade("flux")
    stages, prompt = plan(pipeline), prompt_embeddings("flux")
    with pytest.raises(ValueError, match="`teacher` must be given of stage 1, which uses it"):
        generate_cascade(pipeline, prompt, stages)
    with pytest.raises(ValueError, match="`pipeline` must have text encoders to read a prompt"):
        generate_cascade(pipeline, "a cat", stages, teacher=teacher)
    with pytest.raises(ValueError, match="`prompt` must be text or .* got pooled_prompt_embeds$"):
        generate_cascade(pipeline, dict([prompt.popitem()]), stages, teacher=teacher)
    two = {
        name: value.expand(2, *value.shape[1:]) for name, value in prompt_embeddings("flux").items()
    }
    with pytest.raises(ValueError, match=r"`prompt` must be that of one image, got .* \[2\]"):
        generate_cascade(pipeline, two, stages, teacher=teacher)
    with pytest.raises(ValueError, match="`guidance_scale` must have one value or 3, got 2"):
        plan(pipeline, guidance_scale=[1.0, 2.0])
    with pytest.raises(ValueError, match="`pipeline` must be a FluxPipeline or .*, got a DiTPipe"):
        plan(tiny_pipeline(tiny_lit()))
    pipeline.register_modules(scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="`shift` of stage 2 must be None for a DDIMScheduler"):
        generate_cascade(pipeline, prompt_embeddings("flux"), stages, teacher=teacher)
    pipeline.text_encoder = Encoder()
    with pytest.raises(ValueError, match="`negative_prompt` must be None for FLUX, got 'a dog'"):
        encode_prompt(pipeline, "a cat", "a dog")
    pipeline.vae = None
    with pytest.raises(ValueError, match="`pipeline` must have a vae, got None"):
        plan(pipeline)
    pipeline, teacher = cascade("sd3")
    stages = [Stage(height=104, width=104)]
    with pytest.raises(ValueError, match="`height` of stage 1 must be at most 96, where the pos"):
        generate_cascade(pipeline, prompt_embeddings("sd3"), stages)


@both
def test_the_command(family, tmp_path, capsys):
    pipeline = tiny_clear_pipeline(family, tiny_stock(family))
    pipeline.save_pretrained(tmp_path / "stock")
    model = tiny_clear(family, 8)
    state = model.state_dict()
    weights = {name: state[name] * 1.5 for name in clear_parameter_names(model)}
    save_file(weights, tmp_path / "clear_local_8.safetensors")
    save_file(prompt_embeddings(family), tmp_path / "prompt.safetensors")
    words = [str(tmp_path / "stock"), "--device=cpu", "--num_inference_steps", "2"]
    words += ["--stages", "16x24", "32x48", "--prompt", str(tmp_path / "prompt.safetensors")]
    words += [f"--clear={tmp_path / 'clear_local_8.safetensors'}", f"--output={tmp_path / 'out'}"]
    assert tool.main(words) == 0
    streams = capsys.readouterr()
    assert f"2 images up to 48 x 32 px: {tmp_path / 'out'}" in streams.out
    assert "stage 1 of 2, 24x16: " in streams.err
    assert "stage 2 of 2, 48x32: Clear" in streams.err
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "stage1_24x16.png",
        "stage2_48x32.png",
    ]

    def refused(changes, message):
        assert tool.main([*words, *changes]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert message in line

    refused(["--radius=4"], "error: `--radius` must be that of the weights, 8, got 4")
    refused(["--strength", "0.5", "2"], "error: `strength` of stage 2 must be in (0, 1], got 2")
    refused(["--stages", "16", "0.5"], "error: `stages` must be sizes like 1024 or 768x1024")
    refused(["--stages", "16", "18"], "error: `height` of stage 2 must be a positive multiple of 4")
    refused([f"--prompt={tmp_path / 'out' / 'x.safetensors'}"], "No such file")
    refused([f"--image={tmp_path / 'prompt.safetensors'}"], "error: `--image` must be a picture")
    refused(["--negative_prompt=a dog"], "error: `negative_prompt` must be None where the prompt")
    refused(["--prompt=a cat"], "error: `pipeline` must have text encoders")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    refused([f"--prompt={tmp_path / 'cut.safetensors'}"], "error: `--prompt` must be a whole file")

    convert = [str(tmp_path / "clear_local_8.safetensors"), str(tmp_path / "local")]
    if family == "flux":
        convert += ["--from", "clear", "--base", str(tmp_path / "stock")]
        assert convert_tool.main(convert) == 0
        more = [f"--teacher={tmp_path / 'stock'}", "--teacher_stages=1"]
        more += [f"--output={tmp_path / 'again'}", f"--image={tmp_path / 'out/stage1_24x16.png'}"]
        local = [str(tmp_path / "local"), *(w for w in words[1:] if "clear" not in w)]
        assert tool.main([*local, *more]) == 0
        assert tool.main([*local, "--radius=4"]) == 2
        assert "must be given for a stock transformer, got a Clear" in capsys.readouterr().err
    without = [word for word in words[:-2] if "prompt" not in word]
    assert tool.main(without) == 2
    assert "`--prompt` must be given with --stages" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "stock"), "--device=cpu"]) == 2
    assert "error: `--stages` must be given for a" in capsys.readouterr().err
