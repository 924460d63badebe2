"""What happens to calls, one log line an event: a text for people, and facts under names that stay for machines."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mesh.judge import Again, Final
from mesh.protocol import State
from mesh.settle import Held

logger = logging.getLogger("mesh.worker")


def began(held: Held, worker: str, container: str, attempt: int) -> None:
    """A container was given the input. Said only where somebody wants to see everything."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    facts = {"worker": worker, "container": container, "attempt": attempt}
    _of_call(logging.DEBUG, "began", held, f"→ {{}} try {attempt} on {container}", facts)


def ended(held: Held, verdict: Final | Again) -> None:
    """It has its result, or is tried again. Successes are said only where somebody wants to see everything."""
    match verdict:
        case Final(result, _) if result.state is State.SUCCEEDED and not logger.isEnabledFor(logging.DEBUG):
            return
        case Final(result, _):
            facts = {"state": result.state, "worker": result.worker, "attempt": result.attempt, "error": result.error}
            if result.state is State.SUCCEEDED:
                _of_call(logging.DEBUG, "ended", held, f"← {{}} {result.state}", facts)
            else:
                _of_call(logging.INFO, "ended", held, f"✗ {{}} {result.state}: {result.error}", facts)
        case Again(attempt, delay):
            facts = {"state": attempt.ending, "worker": attempt.worker, "attempt": held.log.tries + 1}
            after = f"again in {delay:g} s" if delay else "again now"
            text = f"↻ {{}} {attempt.ending}, {after}: {attempt.error}"
            _of_call(logging.INFO, "again", held, text, {**facts, "error": attempt.error, "delay": delay})


def container_ended(worker: str, container: str, app: str, function: str, lost: int, reason: str, *, ill: bool) -> None:
    """A container is gone. Said where it took inputs with it, or was `ill`."""
    facts = {"event": "container.ended", "container": container, "app": app, "function": function, "worker": worker}
    level = logging.WARNING if lost or ill else logging.DEBUG
    logger.log(
        level,
        "%s %s.%s %s",
        container,
        app,
        function,
        reason,
        extra={"facts": {**facts, "lost": lost, "reason": reason}},
    )


def _of_call(level: int, event: str, held: Held, text: str, facts: Mapping[str, object]) -> None:
    if not logger.isEnabledFor(level) or held.lease.address is None:
        return
    at = held.lease.address
    about = {"event": f"call.{event}", "call": at.call, "index": at.index, "app": at.app, "function": at.function}
    logger.log(level, "%s", text.replace("{}", f"{at.key} {at.path}", 1), extra={"facts": {**about, **facts}})
