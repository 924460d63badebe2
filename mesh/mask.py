"""A function's own secret values, hidden in what it prints and raises."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from mesh.judge import Execution
from mesh.protocol import Failure

_SHORTEST = 4  # characters of a value that is hidden: to hide `1` would make every output unreadable
_SHORTEST_LINE = 8  # of one line of a value that has several
_SHOWN = "***"


class Mask:
    """Hides some values, whole or (those of several lines) line by line, also as Python's `repr` shows them.

    What is printed in parts, or encoded, is not found: this is for accidents, not against the function itself.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        hidden: set[str] = set()
        for value in values:
            hidden |= {text for text in (value, value.strip(), repr(value)[1:-1]) if len(text) >= _SHORTEST}
            hidden |= {line for line in value.splitlines() if len(line) >= _SHORTEST_LINE}
        longest_first = sorted(hidden, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if hidden else None

    def __call__(self, text: str) -> str:
        """The text without them."""
        return text if self._pattern is None else self._pattern.sub(_SHOWN, text)

    def failure(self, failure: Failure) -> Failure:
        """What was raised, without them in its text and traceback. The exception's own arguments are the caller's."""
        if self._pattern is None:
            return failure
        return dataclasses.replace(failure, text=self(failure.text), traceback=self(failure.traceback))

    def execution(self, execution: Execution) -> Execution:
        """What an input came to, the same way."""
        if self._pattern is None or execution.failure is None:
            return execution
        return dataclasses.replace(execution, failure=self.failure(execution.failure))
