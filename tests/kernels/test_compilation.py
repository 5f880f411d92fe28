"""The compiler takes the kernels: their values are tested in the interpreter, which takes more."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_for_gpu.py")
    done = subprocess.run(
        [sys.executable, str(script), "90"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for word in (
        "ada_layer_norm_fwd_kernel",
        "gated_add_fwd_kernel",
        "grouped_mlp_fwd_kernel",
        "linear_attention_fwd_quadratic_hopper",
        "linear_attention_fwd_moments_hopper",
        "linear_attention_rows_hopper",
        "linear_attention_bwd_dq_hopper",
        "linear_attention_bwd_quadratic_queries_hopper",
        "linear_attention_bwd_quadratic_keys_hopper",
        "local_attention_bwd_dkv_hopper",
        "local_attention_fwd_hopper",
        "rotary_rms_norm_fwd_kernel",
    ):
        assert word in done.stdout
