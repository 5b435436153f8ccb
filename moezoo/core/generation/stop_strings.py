"""Texts that end a generated text, found in a stream of its pieces."""

from collections.abc import Sequence

from moezoo.core.errors import SpecError


class StopStrings:
    """Text before the first stop string of a stream. It does not depend on how the stream is cut into pieces.

    What may be the beginning of a stop string is held back until the next piece tells. First is the stop string that is
    complete first; of several, the longest.

    Attributes:
        found: the stop string that ended the stream; None if there was none yet.

    >>> stop = StopStrings(["END"])
    >>> [stop.add(piece) for piece in ("two E", "ggs E", "ND of")], stop.finish(), stop.found
    (['two ', 'Eggs ', ''], '', 'END')
    """

    def __init__(self, stops: str | Sequence[str] = ()) -> None:
        """`stops`: texts, or one. Raise SpecError: one is empty, or no text."""
        self._stops, self._held = (stops,) if isinstance(stops, str) else tuple(stops), ""
        if not all(isinstance(stop, str) for stop in self._stops):
            raise SpecError(f"stop is {stops!r:.80}; expected a text, or a list of texts, that ends what is generated.")
        if not all(self._stops):
            raise SpecError("a stop string is empty; expected text that ends what is generated. Leave it out.")
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """Return the text that is known to be before a stop string; empty after one."""
        if self.found is not None:
            return ""
        text, self._held = self._held + piece, ""
        places = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stops if stop in text]
        if places:
            _, start, self.found = min(places)
            return text[:start]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return the text held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text with which the stop string begins."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
