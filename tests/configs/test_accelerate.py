"""The files for `accelerate launch --config_file` are what accelerate reads."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from lintra.diffusion import ClearFluxTransformer2DModel
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
    assert set(config.deepspeed_config) <= set(options)


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("one_gpu_bf16", "NO", 1),
        # -1: accelerate asks for --num_processes, the number of GPUs is not the recipe's to know.
        ("several_gpus_bf16", "MULTI_GPU", -1),
        ("fsdp_bf16", "FSDP", -1),
        ("fsdp_flux_bf16", "FSDP", -1),
        ("deepspeed_zero2_bf16", "DEEPSPEED", -1),
    ],
)
def test_it_says_what_its_name_says(name: str, kind: str, processes: int) -> None:
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.num_processes == processes


def test_units_of_fsdp_are_blocks_of_flux() -> None:
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / "fsdp_flux_bf16.yaml"))
    units = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert units == ClearFluxTransformer2DModel._no_split_modules


def test_zero_2_shards_neither_parameters_nor_loading() -> None:
    config = load_config_from_file(
        str(ROOT / "configs" / "accelerate" / "deepspeed_zero2_bf16.yaml")
    )
    assert config.deepspeed_config["zero_stage"] == 2
    assert config.deepspeed_config["zero3_init_flag"] is False
