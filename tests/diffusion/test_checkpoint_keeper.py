"""What the keeper asks of accelerate where DeepSpeed writes the state."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel

from lintra.diffusion.training.checkpoint import CheckpointKeeper
from lintra.diffusion.training.config import CheckpointConfig


class Accelerator(SimpleNamespace):
    """Takes down with what it was called."""

    is_main_process = True
    num_processes = 1
    device = torch.device("cpu")
    _custom_objects = ()

    def register_save_state_pre_hook(self, hook):
        pass

    register_load_state_pre_hook = register_save_state_pre_hook

    def wait_for_everyone(self):
        pass

    def save_state(self, folder, **arguments):
        Path(folder).mkdir(parents=True)
        self.saved = arguments

    def load_state(self, folder, **arguments):
        self.loaded = arguments


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.NO])
def test_deepspeed_leaves_frozen_parameters_out(kind, tmp_path):
    accelerator = Accelerator(distributed_type=kind)
    keeper = CheckpointKeeper(accelerator, tmp_path, CheckpointConfig())
    folder = keeper.save(7)
    assert json.loads((folder / "run.json").read_text()) == {"step": 7, "num_processes": 1}
    assert keeper.load(folder) == 7
    is_deepspeed = kind == DistributedType.DEEPSPEED
    assert accelerator.saved == ({"exclude_frozen_parameters": True} if is_deepspeed else {})
    assert accelerator.loaded == ({"load_module_strict": False} if is_deepspeed else {})


def test_averages_come_back_to_the_device(tmp_path):
    average = EMAModel([torch.zeros(2)])
    accelerator = Accelerator(
        distributed_type=DistributedType.NO, device=torch.device("meta"), _custom_objects=[average]
    )
    keeper = CheckpointKeeper(accelerator, tmp_path, CheckpointConfig())
    keeper.load(keeper.save(7))
    assert average.shadow_params[0].device.type == "meta"
