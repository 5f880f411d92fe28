"""A polite stop: the first SIGINT or SIGTERM asks the loop to save and end."""

import signal
from types import FrameType
from typing import Self


class StopRequest:
    """Context in which SIGINT and SIGTERM only set `signum`; a second SIGINT interrupts at once."""

    signum: int | None = None

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
