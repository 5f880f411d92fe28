"""Times the implementations of a case in turns: a host that changes its pace does so for them all.

Measured one after the other, minutes apart, two models that wait for the host have a ratio of the
host's making. Here all are prepared and warmed up, then each gets a few calls again and again.

A turn waits for the device, makes one call off the clock and times the next `TURN`. Without the
wait launches would hide behind what the other model left on the GPU, and the host's time would be
lost or charged to the wrong one. The untimed call then leaves queue, caches and allocator as each
call of a model alone leaves them to its next. Turns are as short as that allows: with two calls a
third of them is off the clock.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from .case import Run
from .device import OUT_OF_MEMORY, Peak, release, short, synchronize
from .timing import SLOW_SECONDS, Clock, Limits, Times, num_calls, times_of, warm_up

TURN = 2


class Entrant:
    """One implementation among those that take turns: warm, its memory measured, its own clock.

    Args:
        run: called with inputs; in direction ``step`` it does its own backward.
        direction: ``fwd`` or ``step``.
        inputs: to warm up with.
        device: of the inputs.
        limits: how often.
    """

    def __init__(
        self, run: Run, direction: str, inputs: list[Tensor], device: torch.device, limits: Limits
    ) -> None:
        self._run = run
        self._with_grad = direction != "fwd"
        self._device = device
        self._clock = Clock(device)
        self.call(inputs)  # compiles, and makes what stays, as the moments of AdamW
        self.seconds, _ = warm_up(lambda: self.call(inputs), device, limits.warmup)
        peak = Peak(device)
        self.call(inputs)
        self._peak_bytes = peak.bytes()
        synchronize(device)

    @property
    def is_slow(self) -> bool:
        """It fills the GPU for so long that what was there before is nothing to it."""
        return self.seconds > SLOW_SECONDS

    def num_calls(self, limits: Limits) -> int:
        """Calls to time; those off the clock are within the limit too."""
        return num_calls(limits, self.seconds * (1 if self.is_slow else 1 + 1 / TURN))

    def call(self, inputs: list[Tensor]) -> None:
        with torch.set_grad_enabled(self._with_grad):
            self._run(*inputs)

    def take_turn(self, inputs: Iterator[list[Tensor]], calls: int, is_first: bool) -> None:
        """Times so many calls with the next inputs each."""
        synchronize(self._device)
        if is_first and not self.is_slow:
            # The GPU has waited since for the others to compile.
            warm_up(lambda: self.call(next(inputs)), self._device)
        if not self.is_slow:
            self.call(next(inputs))
        for _ in range(calls):
            self._clock.time(partial(self.call, next(inputs)), 0.0)
        synchronize(self._device)

    def times(self) -> Times:
        return times_of(self._clock, self._peak_bytes)


def take_turns(
    entrants: Mapping[str, Entrant], sets: Sequence[list[Tensor]], limits: Limits
) -> dict[str, Times | str]:
    """Times of each, or why there are none.

    Args:
        entrants: by name, in the order of their turns.
        sets: inputs, of which every call of anyone takes the next: none finds what the call of
            another has just read.
        limits: of one entrant's calls. Where a slow one gets fewer, the others make theirs in as
            many turns.
    """
    wanted = {name: entrant.num_calls(limits) for name, entrant in entrants.items()}
    rounds = -(-min(wanted.values(), default=0) // TURN)
    inputs = cycle(sets)
    errors: dict[str, str] = {}
    for index in range(rounds):
        for name, entrant in entrants.items():
            if name in errors:
                continue
            calls = wanted[name] * (index + 1) // rounds - wanted[name] * index // rounds
            try:
                entrant.take_turn(inputs, calls, is_first=index == 0)
            except Exception as error:  # one that fails is a result, and the others go on
                errors[name] = short(error)
    return {name: errors.get(name) or entrant.times() for name, entrant in entrants.items()}


def time_in_turns(
    prepares: Mapping[str, Callable[[], Run]],
    direction: str,
    sets: Sequence[list[Tensor]],
    device: torch.device,
    limits: Limits,
    *,
    skipped: Callable[[str], str],
    say: Callable[[str], None],
) -> dict[str, Times | str]:
    """Prepares all, then times them in turns.

    Args:
        prepares: by name, makes what is timed; in the order of the results.
        direction: ``fwd`` or ``step``.
        sets: inputs, see `num_sets`.
        device: of the inputs.
        limits: of each one's calls.
        skipped: asked before one is prepared: why it is not, empty if it is.
        say: takes lines about progress.

    Returns:
        By name the times, or why there are none. One for which there is no memory left beside the
        others is timed after them.
    """
    # Code of earlier cases would fill the recompile limit; within a case all keep theirs.
    torch._dynamo.reset()
    results: dict[str, Times | str] = {}
    entrants: dict[str, Entrant] = {}
    crowded: list[str] = []
    for name, prepare in prepares.items():
        if reason := skipped(name):
            results[name] = reason
            continue
        # The blocks that another one's warm-up left are not for this one's peak.
        release(device)
        try:
            entrants[name] = Entrant(prepare(), direction, sets[0], device, limits)
            # So that a run that is cut short while others compile has said something.
            say(f"  {direction}: {name}: {entrants[name].seconds * 1e3:.4f} ms to warm up")
        except Exception as error:  # a peer that fails is a result, and so is ours
            results[name] = short(error)
            crowded += [name] if entrants and results[name] == OUT_OF_MEMORY else []
    timed = take_turns(entrants, sets, limits)
    if len(entrants) > 1:
        crowded += [name for name, result in timed.items() if result == OUT_OF_MEMORY]
    results |= timed
    entrants.clear()
    release(device)
    for name in crowded:
        alone = {name: prepares[name]}
        results |= time_in_turns(alone, direction, sets, device, limits, skipped=skipped, say=say)
    return {name: results[name] for name in prepares}
