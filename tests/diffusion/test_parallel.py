"""Attention over two processes against attention in one, forward and backward."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lintra.diffusion.parallel import (
    parallel_linear_attention,
    parallel_local_attention,
    parallel_token_conv2d,
)
from lintra.diffusion.row_shards import gather_tokens, row_split
from lintra.kernels import linear_attention, local_attention, token_conv2d
from tiny_clear import clear_inputs, sample, tiny_clear, tiny_clear_pipeline

TEXT, DTYPE = 3, torch.float64


def draw(*shape):
    return torch.randn(shape, dtype=DTYPE, requires_grad=True)


def shares(x, rank, grid, num_text):
    """The text and the rows of a rank."""
    rows = row_split(grid[0], dist.get_world_size())[rank]
    image = x[:, num_text + rows.start * grid[1] : num_text + rows.stop * grid[1]]
    return torch.cat([x[:, :num_text], image], dim=1).detach().requires_grad_()


def compare(rank, grid, num_text, whole, alone, together):
    """Output and gradients of the tensors `whole`, of a rank's share of them."""
    expected = alone(*whole)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, whole, weight)
    parts = [shares(x, rank, grid, num_text) for x in whole]
    out = together(*parts)
    torch.testing.assert_close(out, shares(expected, rank, grid, num_text))
    got = torch.autograd.grad(out, parts, shares(weight, rank, grid, num_text))
    for mine, whole_grad in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, shares(whole_grad, rank, grid, num_text))


def check_local(rank, grid, radius, num_text, num_extra):
    qkv = [draw(2, num_text + grid[0] * grid[1], 2, dim) for dim in (4, 4, 3)]
    extra = [draw(2, num_extra, 2, dim) for dim in (4, 3)] if num_extra else [None, None]
    options = {"grid": grid, "radius": radius, "num_prefix": num_text, "scale": 0.7}

    def alone(q, k, v):
        return local_attention(q, k, v, extra_key=extra[0], extra_value=extra[1], **options)

    def together(q, k, v):
        return parallel_local_attention(
            q, k, v, extra_key=extra[0], extra_value=extra[1], **options
        )

    compare(rank, grid, num_text, qkv, alone, together)


def check_pooled(rank, grid):
    """Extra keys that come from the image itself, gathered."""
    counts = [len(rows) * grid[1] for rows in row_split(grid[0], dist.get_world_size())]
    options = {"grid": grid, "radius": 2}

    def alone(q, k, v):
        return local_attention(q, k, v, extra_key=2 * k, extra_value=v, **options)

    def together(q, k, v):
        extra = (gather_tokens(x, counts) for x in (2 * k, v))
        key, value = extra
        return parallel_local_attention(q, k, v, extra_key=key, extra_value=value, **options)

    compare(rank, grid, 0, [draw(1, grid[0] * grid[1], 2, 4) for _ in range(3)], alone, together)


def check_linear(rank, grid, feature_map):
    options = {"feature_map": feature_map, "scale": 0.5, "eps": 0.1}
    qkv = [draw(2, grid[0] * grid[1], 2, dim) for dim in (4, 4, 3)]
    if feature_map == "identity":  # no denominator near zero
        qkv = [x.detach().abs().requires_grad_() for x in qkv]
    compare(
        rank,
        grid,
        0,
        qkv,
        lambda *x: linear_attention(*x, **options),
        lambda *x: parallel_linear_attention(*x, **options),
    )


def check_convolution(rank, grid):
    weight, bias, residual = draw(4, 5, 5), draw(4), draw(1, grid[0] * grid[1], 4)
    tokens = [draw(1, grid[0] * grid[1], 4), residual]

    def alone(x, y):
        return token_conv2d(x, weight, bias, grid=grid, residual=y)

    def together(x, y):
        return parallel_token_conv2d(x, weight, bias, grid=grid, residual=y)

    compare(rank, grid, 0, tokens, alone, together)


def check_pipeline(pooled):
    """Sampling with the rows split, whole and in one process."""
    changes = {"down_factor": 2, "proportional_scale": True} if pooled else {"ntk_factor": 4.0}
    model = tiny_clear("flux", 3, full_attention_layers=[1], **changes)
    pipeline = tiny_clear_pipeline("flux", model)
    kwargs = {"process_group": dist.group.WORLD, "radius": 2.5}
    lengths = []
    model.proj_out.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
    latents = [
        sample("flux", pipeline, output_type="latent", joint_attention_kwargs=each)
        for each in (kwargs, {"radius": 2.5})
    ]
    torch.testing.assert_close(*latents)
    assert len(lengths) == 4
    assert lengths[0] < lengths[2] == 60


def check_controlnet():
    inputs, model = clear_inputs("flux", (6, 5)), tiny_clear("flux")
    residuals = [torch.randn(2, 30, 32) for _ in range(2)]
    controls = {"controlnet_block_samples": residuals, "controlnet_single_block_samples": residuals}
    with torch.no_grad():
        expected = model(**inputs, **controls).sample
        kwargs = {"joint_attention_kwargs": {"process_group": dist.group.WORLD}}
        torch.testing.assert_close(model(**inputs, **controls, **kwargs).sample, expected)
    with pytest.raises(NotImplementedError, match="`process_group` must be None while gradients"):
        model(**inputs, **kwargs)
    with pytest.raises(NotImplementedError, match="`process_group` must be None: SD3 is not split"):
        tiny_clear("sd3")(**clear_inputs("sd3"), **kwargs)


def check_errors(rank):
    x = draw(1, 4, 1, 4)
    with pytest.raises(ValueError, match=r"`query` must hold rows .* 6 image tokens, got 4"):
        parallel_local_attention(x, x, x, grid=(4, 3), radius=2)
    with pytest.raises(ValueError, match="`query` must hold at least 2 image tokens .* got 1"):
        parallel_local_attention(x, x, x, grid=(2, 1), radius=2, num_prefix=3)
    with pytest.raises(ValueError, match="`feature_map` must be relu or identity, got 'elu1'"):
        parallel_linear_attention(x, x, x, feature_map="elu1")
    with pytest.raises(ValueError, match="`tokens` must be 5 on this rank, got 4"):
        gather_tokens(x, [5, 5])


def work(rank, folder, num_ranks=2):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )
    for grid, radius, num_text, num_extra in (
        ((7, 4), 3, TEXT, 0),
        ((6, 5), 2.5, 0, 4),
        ((4, 4), 30, TEXT, 2),  # a halo beyond the neighbour's rows
        ((2, 3), 4, 7, 0),  # more text than a rank has image tokens
        ((4, 3), 1, TEXT, 0),  # no halo
    ):
        check_local(rank, grid, radius, num_text, num_extra)
    check_pooled(rank, (5, 3))
    for feature_map in ("relu", "identity"):
        check_linear(rank, (5, 4), feature_map)
    check_convolution(rank, (5, 4))
    check_pipeline(pooled=False)
    check_pipeline(pooled=True)
    check_controlnet()
    check_errors(rank)
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    tests = Path(__file__).parent
    script = f"""
import sys
sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]
from test_parallel import work
work(int(sys.argv[1]), {str(tmp_path)!r})
"""
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def test_row_split():
    assert row_split(7, 3) == (range(2), range(2, 4), range(4, 7))
    assert row_split(20, 2, multiple=4) == (range(8), range(8, 20))
    with pytest.raises(ValueError, match=r"`num_ranks` must be in 1 .. 2 for 4 rows .*, got 3"):
        row_split(4, 3, multiple=2)
    with pytest.raises(ValueError, match="`height` must be a multiple of 4, got 6"):
        row_split(6, 1, multiple=4)
