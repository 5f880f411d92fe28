"""Optimisers by name, with what the papers train with."""

import sys

import pytest
import torch

from lintra.diffusion.training.config import TrainingConfig
from lintra.diffusion.training.optimizers import OPTIMIZERS, make_optimizer


def config(**changes):
    return TrainingConfig(max_train_steps=1, train_batch_size=1, **changes)


def weight():
    return torch.nn.Parameter(torch.ones(4, 3))


def test_adamw():
    options = {"adam_beta1": 0.8, "adam_weight_decay": 0.1, "optimizer_arguments": {"eps": 1e-5}}
    optimizer = make_optimizer([weight()], config(**options))
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.999), 0.1, 1e-5)


@pytest.mark.parametrize("name", ["prodigy", "came"])
def test_of_the_library(name):
    pytest.importorskip("pytorch_optimizer", reason="needs lintra[optimizers]")
    parameter = weight()
    rate = 1.0 if name == "prodigy" else 2e-5
    made = config(optimizer=name, learning_rate=rate, adam_weight_decay=1e-4)
    optimizer = make_optimizer([parameter], made)
    group = optimizer.param_groups[0]
    assert group["lr"] == rate
    assert group["weight_decay"] == 1e-4
    if name == "came":
        assert group["betas"] == (0.9, 0.999, 0.9999)
        assert (group["eps1"], group["eps2"]) == (1e-30, 1e-16)
    else:
        assert group["betas"][:2] == (0.9, 0.999)
        assert all(group[key] for key in ("weight_decouple", "bias_correction", "safeguard_warmup"))
    for _ in range(2):
        parameter.square().sum().backward()
        optimizer.step()
    assert parameter.isfinite().all()
    assert (parameter != 1).all()


@pytest.mark.parametrize("name", ["prodigy", "came"])
def test_without_the_library(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match=rf"must be adamw where .* got {name}: pip install"):
        make_optimizer([weight()], config(optimizer=name))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`training.optimizer_arguments` must be those of AdamW"):
        make_optimizer([weight()], config(optimizer_arguments={"speed": 2}))
    assert set(OPTIMIZERS) == {"adamw", "prodigy", "came"}
