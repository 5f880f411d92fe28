"""What holds for every test: no network, a fair share of the cores, one seed, GPU only if there."""

import os

# Before any import: both are read once, and processes that a test starts inherit them. A worker
# inherits what the main process of pytest-xdist has set here for itself alone: so never more than
# a share, as threads that wait for a core make small operations tens of times slower.
os.environ["HF_HUB_OFFLINE"] = "1"
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_SHARE = max(1, (os.cpu_count() or 1) // _WORKERS)
_THREADS = min(_SHARE, int(os.environ.get("OMP_NUM_THREADS", _SHARE)))
os.environ["OMP_NUM_THREADS"] = str(_THREADS)

import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(_THREADS)
if not torch.cuda.is_available():
    # Before triton is imported: its kernels then run on the CPU, in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that libraries use unasked
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
