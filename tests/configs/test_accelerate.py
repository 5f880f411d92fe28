"""The files for `accelerate launch --config_file` are what accelerate reads."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from rooms import ROOT

FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision == "bf16"
    # The launcher copies these onto its options without asking whether such an option exists.
    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.fsdp_config) <= set(options)


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("one_gpu_bf16", "NO", 1),
        # -1: accelerate asks for --num_processes, the number of GPUs is not the recipe's to know.
        ("several_gpus_bf16", "MULTI_GPU", -1),
        ("fsdp_bf16", "FSDP", -1),
    ],
)
def test_it_says_what_its_name_says(name: str, kind: str, processes: int) -> None:
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.num_processes == processes
