"""The workers of the suite share the cores: threads that outnumber them wait for each other."""

import os

import torch


def test_a_worker_takes_no_more_than_its_share() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    share = max(1, (os.cpu_count() or 1) // workers)
    assert int(os.environ["OMP_NUM_THREADS"]) <= share
    assert torch.get_num_threads() <= share
