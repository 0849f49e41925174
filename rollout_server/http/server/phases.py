"""What a starting server is doing, printed as it begins: a start takes a minute and more."""

import asyncio
import time

STILL_SECONDS = 15.0


class Phases:
    """Prints a line for each phase of a start, with the seconds since the start began."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._text = ""

    @property
    def seconds(self) -> float:
        """Since the start began."""
        return time.monotonic() - self._started

    def begin(self, text: str) -> None:
        """The next phase begins."""
        self._text = text
        print(f"{'starting':<17} {self.seconds:6.1f} s  {text}", flush=True)

    async def remind(self) -> None:
        """Say again what is being done when it takes long. Runs until it is cancelled."""
        while True:
            text = self._text
            await asyncio.sleep(STILL_SECONDS)
            if text == self._text:
                print(f"{'starting':<17} {self.seconds:6.1f} s  still {text}", flush=True)
