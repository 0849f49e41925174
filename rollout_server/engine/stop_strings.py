"""Stop strings in text that arrives in pieces."""

from dataclasses import dataclass


@dataclass(slots=True)
class StopFinder:
    """Finds the stop string that is complete first and holds back text that may be the beginning of one.

    Of those complete with the same character the first in `stops` wins. `included`: the text that is shown ends with
    the stop string, not before it. `passed`: so many characters of `held` were let pass, and none may end in them. A
    copy (`copy.copy`) goes on by itself.
    """

    stops: tuple[str, ...]
    included: bool = False
    held: str = ""
    passed: int = 0

    def push(self, piece: str) -> tuple[str, str | None]:
        """Text that can be shown, and the stop string that was found; what comes after it is lost."""
        text = self.held + piece
        first: tuple[int, str] | None = None
        for stop in self.stops:
            start = text.find(stop, max(self.passed - len(stop) + 1, 0))
            if start >= 0 and (first is None or start + len(stop) < first[0]):
                first = start + len(stop), stop
        if first is not None:
            self.held = ""
            return text[: first[0] if self.included else first[0] - len(first[1])], first[1]
        return self._hold(text, self.passed), None

    def let_pass(self, piece: str) -> str:
        """As `push`, but no stop string may end in `piece`; one that ends later may begin there."""
        text = self.held + piece
        return self._hold(text, len(text))

    def flush(self) -> str:
        """What was held back: the response has ended, and no stop string was complete."""
        held, self.held = self.held, ""
        return held

    def _hold(self, text: str, passed: int) -> str:
        shown = len(text) - self._possible_beginning(text)
        self.held = text[shown:]
        self.passed = max(passed - shown, 0)
        return text[:shown]

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = 0
        for stop in self.stops:
            start = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
            while 0 <= start < len(text) - longest:
                if stop.startswith(text[start:]):
                    longest = len(text) - start
                start = text.find(stop[0], start + 1)
        return longest
