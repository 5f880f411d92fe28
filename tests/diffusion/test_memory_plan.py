"""The memory plan counts what a run has, and the numbers of FLUX.1-dev."""

import pytest
import torch
from accelerate.state import AcceleratorState

from lintra.diffusion.training.loop import Trainer
from lintra.diffusion.training.memory_plan import format_plans, memory_plan
from lintra.tools import memory_plan as tool
from tiny_clear import FLUX
from tiny_recipes import text_recipe
from tiny_text import make_tiny_cache, tiny_text_pipeline


def test_flux_dev():
    plan = memory_plan()
    assert plan.num_parameters == 11_901_408_320
    assert plan.num_trained == 190 * (3072 * 3072 + 3072)  # weights and biases: 380 tensors
    assert plan.shared == 2 * plan.num_parameters
    assert plan.total < 80e9
    half = memory_plan(master_weights=False)
    assert plan.states == 2 * half.states == 4 * plan.num_trained * 2
    lora = memory_plan(trainable="lora", rank=16)
    assert lora.num_trained < 0.02 * plan.num_trained
    zero = memory_plan(master_weights=False, zero2_gpus=4)
    assert zero.states == 8 * plan.num_trained // 4
    text = format_plans([plan, zero])
    assert "11.901 B parameters" in text
    assert "| CLEAR's set, bfloat16, adamw, ZeRO-2 on 4 GPUs | 1.794 | 22.2 |" in text


def test_an_unknown_optimizer():
    with pytest.raises(ValueError, match="`optimizer` must be one of adamw, prodigy, got 'sgd'"):
        memory_plan(optimizer="sgd")


def test_the_command(capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    assert "lintra memory-plan" in capsys.readouterr().out


def storage_bytes(tensors):
    """Bytes of all distinct storages."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("trainable", ["clear", "lora"])
def test_a_run_has_what_the_plan_counts(trainable, tmp_path):
    pipeline = tiny_text_pipeline("flux")
    pipeline.save_pretrained(tmp_path / "pipeline")
    cache = make_tiny_cache(tmp_path / "cache", tmp_path / "pipeline")
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process, otherwise
    recipe = text_recipe(
        tmp_path / "run",
        "flux",
        tmp_path / "pipeline",
        cache,
        model={"trainable": trainable, "rank": 4},
        training={"mixed_precision": "bf16", "max_train_steps": 1},
    )
    trainer = Trainer(recipe)
    plan = memory_plan(FLUX, trainable=trainable, rank=4)
    models = trainer.models
    weights = [*models.student.parameters(), *models.teacher.parameters()]
    assert storage_bytes(weights) == plan.shared + plan.trained
    trainer.run()
    AcceleratorState._reset_state(reset_partial_state=True)
    states = trainer.optimizer.state_dict()["state"].values()
    tensors = [value for state in states for value in state.values() if torch.is_tensor(value)]
    assert storage_bytes([value for value in tensors if value.ndim]) == plan.states
