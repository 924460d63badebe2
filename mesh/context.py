"""What code may ask about where it runs: the current call, its attempt, and whether this is a container at all."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass

from mesh.exception import InvalidError


@dataclass(frozen=True, slots=True)
class Running:
    """The input that runs in this thread or task."""

    call: str
    index: int
    attempt: int
    last_error: str
    seq: int  # its number between worker and container

    @property
    def key(self) -> str:
        return f"{self.call}.{self.index}"


@dataclass(slots=True)
class Container:
    """The container this process is. `app` is its app's name on the wire, `image` the mark of its image."""

    app: str
    function: str
    environment: str
    announce_waiting: Callable[[int, bool], None]
    image: str = ""


current: ContextVar[Running | None] = ContextVar("mesh_current", default=None)
_container: Container | None = None


def enter_container(container: Container) -> None:
    """Say that this process is a container; before any code of the user is imported."""
    global _container
    _container = container


def container() -> Container | None:
    """The container this process is, or `None`."""
    return _container


def is_local() -> bool:
    """False inside a container, true everywhere else."""
    return _container is None


def current_function_call_id() -> str | None:
    """Id (`fc-…`) of the call that runs here; `None` outside a function. Right in each thread and task of its own."""
    running = current.get()
    return running.call if running else None


def current_input_id() -> str | None:
    """Id (`fc-….0`) of the input that runs here; `None` outside a function."""
    running = current.get()
    return running.key if running else None


def current_attempt() -> int | None:
    """Which try this is, from 1: tries that raised or timed out count, lost containers do not; `None` outside."""
    running = current.get()
    return running.attempt if running else None


def last_error() -> str:
    """What went wrong with this input before, as `Type: text`; empty at its first try, and outside a function."""
    running = current.get()
    return running.last_error if running else ""


_waiting_lock = threading.Lock()
_waiting_inputs: Counter[int] = Counter()  # how many calls each waits for: an async function may gather several


@contextlib.contextmanager
def waiting_in_mesh() -> Generator[None]:
    """Mark that the current input only waits for other calls: a container of which all do lends its place to them."""
    running, here = current.get(), _container
    if running is None or here is None:
        yield
        return
    _container_waits(here, running.seq, 1)
    try:
        yield
    finally:
        _container_waits(here, running.seq, -1)


def _container_waits(container: Container, seq: int, change: int) -> None:
    with _waiting_lock:
        before = seq in _waiting_inputs
        _waiting_inputs[seq] += change
        if not _waiting_inputs[seq]:
            del _waiting_inputs[seq]
        if (seq in _waiting_inputs) != before:
            container.announce_waiting(seq, not before)


_output_enabled = False


@contextlib.contextmanager
def enable_output() -> Generator[None]:
    """Show what a running app's functions print, and what becomes of it, while the block runs."""
    global _output_enabled
    before, _output_enabled = _output_enabled, True
    try:
        yield
    finally:
        _output_enabled = before


def output_enabled() -> bool:
    """Whether `enable_output` is in force."""
    return _output_enabled


_show_times = False


def show_times(wanted: bool) -> None:
    """Put the time before each line that `enable_output` shows."""
    global _show_times
    _show_times = wanted


def shown(text: str) -> str:
    """Output of a function as it is to be shown."""
    if not _show_times:
        return text
    now = time.strftime("%H:%M:%S ")
    return "".join(now + line for line in text.splitlines(keepends=True))


def interact() -> None:
    """Exists for code written for Modal.

    Raises:
        InvalidError: always; mesh has no interactive containers.
    """
    raise InvalidError("interact() works in interactive containers only, which mesh does not have")
