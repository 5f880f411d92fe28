"""Batches, noise and dropped labels depend on seed and step alone."""

from itertools import islice

import torch

from lintra.diffusion.training.assemble import build_process
from lintra.diffusion.training.batches import BucketSampler, StepSampler, flip_half, step_generator
from lintra.diffusion.training.config import NoiseConfig
from lintra.diffusion.training.families import ClassFamily
from lintra.diffusion.training.objective import Objective, disable_internal_label_dropout
from tiny_models import inputs, tiny_dit


def take(count, **changes):
    options = {"seed": 0, "start": 0, "rank": 0, "num_processes": 1, **changes}
    return list(islice(StepSampler(10, 4, **options), count))


def test_every_epoch_has_every_image_once():
    # 20 = two epochs, whose border lies inside the third batch
    indices = [index for batch in take(5) for index in batch]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]


def test_starting_later_continues_the_same_sequence():
    assert take(5)[3:] == take(2, start=3)


def test_processes_share_one_sequence():
    parts = [take(3, rank=rank, num_processes=2) for rank in range(2)]
    assert [batch for pair in zip(*parts, strict=True) for batch in pair] == take(6)


def test_seeds_differ():
    assert take(2) != take(2, seed=1)
    draws = {
        torch.rand(1, generator=step_generator(*key)).item()
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, -1)]
    }
    assert len(draws) == 5


def test_flips():
    images = torch.arange(64 * 6.0).view(64, 1, 2, 3)
    flipped = flip_half(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 16 < mirrored.sum() < 48


class Spy(torch.nn.Module):
    """Records its arguments and predicts nothing."""

    dtype = torch.float32

    def forward(self, x, timestep, class_labels, return_dict):
        self.seen = (x, timestep, class_labels)
        return (torch.cat([x, x], 1),)


def test_student_and_teacher_see_the_same_input_and_condition():
    weights = {"noise": 1.0, "noise_distillation": 0.5}
    options = {"dropout_prob": 0.5, "unconditional": {"class_labels": torch.tensor(10)}}
    objective = Objective(ClassFamily({}), build_process(NoiseConfig()), weights, **options)
    student, teacher = Spy(), Spy()
    labels = torch.arange(200) % 10
    condition = {"class_labels": labels}
    clean = torch.randn(200, 1, 2, 2)
    objective(student, teacher, clean, condition, step_generator(0, 0, 0))
    for a, b in zip(student.seen, teacher.seen, strict=True):
        assert torch.equal(a, b)
    dropped = student.seen[2] == 10
    assert 70 < dropped.sum() < 130
    assert torch.equal(student.seen[2][~dropped], labels[~dropped])
    first = student.seen
    objective.weights = {"noise": 1.0}
    objective(student, None, clean, condition, step_generator(0, 0, 0))
    assert all(torch.equal(a, b) for a, b in zip(first, student.seen, strict=True))


def test_no_block_drops_labels_for_itself():
    model = tiny_dit().train()
    disable_internal_label_dropout(model)
    outputs = [model(**inputs()).sample for _ in range(20)]
    assert all(torch.equal(out, outputs[0]) for out in outputs)


BUCKETS = torch.tensor([0] * 7 + [1] * 2 + [3] * 6)


def take_buckets(count, **changes):
    options = {"seed": 0, "start": 0, "rank": 0, "num_processes": 1, **changes}
    return list(islice(BucketSampler(BUCKETS, 2, **options), count))


def test_batches_of_buckets_hold_one_size_and_every_item():
    epochs = take_buckets(16)
    for batches in (epochs[:8], epochs[8:]):
        assert all(len(BUCKETS[batch].unique()) == 1 for batch in batches)
        indices = [index for batch in batches for index in batch]
        assert set(indices) == set(range(15))
        assert len(indices) == 16  # one of the seven fills up the last batch of its bucket
    assert epochs[:8] != epochs[8:]
    assert take_buckets(8, seed=1) != epochs[:8]


def test_buckets_resume_and_are_shared_by_processes():
    for options in ({}, {"num_processes": 2}):
        assert take_buckets(30, **options)[17:] == take_buckets(13, start=17, **options)
    parts = [take_buckets(10, rank=rank, num_processes=2) for rank in range(2)]
    for first, second in zip(*parts, strict=True):
        assert len(BUCKETS[[*first, *second]].unique()) == 1
    # 2 + 1 + 2 global batches of four an epoch; the smallest bucket repeats its two items.
    seen = [index for part in parts for batch in part[:5] for index in batch]
    assert set(seen) == set(range(15))
    assert len(seen) == 20
