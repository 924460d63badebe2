"""Every error mesh raises, with Modal's names, so that code written for Modal catches the same things.

    Error (Exception)
     ├ AlreadyExistsError          a name is taken
     ├ AuthError                   the server refused these credentials, or there are none
     ├ ClientClosed                the object's connection was closed
     ├ ConnectionError             the server cannot be reached, or did not answer in time
     ├ DataLossError               stored data does not match its digest
     ├ DeserializationError        bytes could not be turned back into Python objects
     ├ ExecutionError              something ran (or was asked to run) in the wrong way or place
     ├ FilesystemExecutionError, SandboxFilesystemError   for code written for Modal
     ├ InternalError               a fault of mesh itself
     ├ InternalFailure             the container or worker was lost too often
     │  └ OutOfMemoryError           …because it used too much memory
     ├ InvalidError                an argument, option or name is not allowed
     │  └ ConflictError              somebody else changed the same thing first
     ├ LogsFetchError              logs could not be read
     ├ NotFoundError               no such app, function, call or object
     ├ PermissionDeniedError       the server does not allow this to this user
     ├ RemoteError                 the call ended without a value: cancelled, or a remote fault
     │  └ ImageBuildError            an environment could not be built
     ├ RequestSizeError            larger than the stated limit
     ├ ResourceExhaustedError      a queue, quota or disk is full
     ├ SerializationError          Python objects could not be turned into bytes
     ├ ServiceError                the server answered with an error it should not
     ├ TimeoutError                NOT a builtin TimeoutError, on purpose (see below)
     │  ├ ExecTimeoutError, InteractiveTimeoutError, MountUploadTimeoutError,
     │  │  SandboxTimeoutError, VolumeUploadTimeoutError
     │  ├ FunctionTimeoutError       the function used up its time, and its retries
     │  └ OutputExpiredError         the result was kept for its time, and is gone
     ├ UnimplementedError          mesh does not do this (yet)
     └ VersionError                two sides are too far apart to understand each other
    InputCancellation (BaseException)   raised inside a function that is cancelled or out of time
    NotReadyError (builtin TimeoutError)   `get(timeout=…)`: there is no result yet
    AsyncUsageWarning, DeprecationError, ServerWarning (UserWarning)
    ModuleNotMountable (Exception)   for code written for Modal

A poller written for Modal says ``except OutputExpiredError: …  except TimeoutError: pending``, where the second
name is the builtin. So only "not ready yet" may be a builtin TimeoutError: were FunctionTimeoutError one too, a call
that is dead would look pending for ever. NotReadyError is a class of its own so that a caller can also tell it from a
builtin TimeoutError which the function itself raised.
"""

from __future__ import annotations

import builtins
import random
import signal

__all__ = [
    "AlreadyExistsError",
    "AsyncUsageWarning",
    "AuthError",
    "ClientClosed",
    "ConflictError",
    "ConnectionError",
    "DataLossError",
    "DeprecationError",
    "DeserializationError",
    "Error",
    "ExecTimeoutError",
    "ExecutionError",
    "FilesystemExecutionError",
    "FunctionTimeoutError",
    "ImageBuildError",
    "InputCancellation",
    "InteractiveTimeoutError",
    "InternalError",
    "InternalFailure",
    "InvalidError",
    "LogsFetchError",
    "ModuleNotMountable",
    "MountUploadTimeoutError",
    "NotFoundError",
    "NotReadyError",
    "OutOfMemoryError",
    "OutputExpiredError",
    "PermissionDeniedError",
    "RemoteError",
    "RequestSizeError",
    "ResourceExhaustedError",
    "SandboxFilesystemError",
    "SandboxTimeoutError",
    "SerializationError",
    "ServerWarning",
    "ServiceError",
    "TimeoutError",
    "UnimplementedError",
    "VersionError",
    "VolumeUploadTimeoutError",
    "simulate_preemption",
]


class Error(Exception):
    """Base of every error mesh raises; catch it to catch them all."""


class AlreadyExistsError(Error):
    """A thing of this name exists already."""


class AuthError(Error):
    """The server refused the credentials, or credentials are needed and none are set."""


class ClientClosed(Error):
    """The connection this object belongs to was closed."""


class ConnectionError(Error):  # the builtin's name, because it is Modal's
    """The server cannot be reached, or did not answer in time."""


class DataLossError(Error):
    """Stored bytes do not match the digest they are stored under."""


class DeserializationError(Error):
    """Bytes could not be turned back into Python objects on the side that needed them."""


class ExecutionError(Error):
    """A call could not be made or run as asked; also stands in for errors whose class does not exist here."""


class FilesystemExecutionError(Error):
    """Exists for code written for Modal; mesh has no sandboxes."""


class InternalError(Error):
    """A fault of mesh itself. Please report it."""


class InternalFailure(Error):
    """The container or the worker running the call was lost more often than its budget allows."""


class OutOfMemoryError(InternalFailure):
    """The container was killed for using too much memory."""


class InvalidError(Error):
    """An argument, option or name is not allowed; the text states what is."""


class ConflictError(InvalidError):
    """Somebody else changed the same thing first; look, and try again."""


class LogsFetchError(Error):
    """Logs could not be read."""


class NotFoundError(Error):
    """There is no such app, function, call or object."""


class PermissionDeniedError(Error):
    """The server does not allow this to this user."""


class RemoteError(Error):
    """The call ended without a value: it was cancelled, or something failed on the remote side."""


class ImageBuildError(RemoteError):
    """The environment of a function could not be built."""

    def __init__(self, message: str, image_id: str = "") -> None:
        super().__init__(message)
        self.image_id = image_id


class RequestSizeError(Error):
    """Larger than the stated limit."""


class ResourceExhaustedError(Error):
    """A queue, a quota or the disk is full; nothing was accepted."""


class SandboxFilesystemError(Error):
    """Exists for code written for Modal; mesh has no sandboxes."""


class SerializationError(Error):
    """Python objects could not be turned into bytes; the text names what, and where it hides."""


class ServiceError(Error):
    """The server answered with an error it should not."""


class TimeoutError(Error):  # Modal's name, and deliberately not the builtin: see the top of this file
    """Base of mesh's own time limits. Not a builtin TimeoutError: see the top of this file."""


class ExecTimeoutError(TimeoutError):
    """Exists for code written for Modal; mesh has no sandboxes."""


class FunctionTimeoutError(TimeoutError):
    """The function ran longer than its `timeout`, in every try it had."""


class InteractiveTimeoutError(TimeoutError):
    """Exists for code written for Modal; mesh has no interactive containers."""


class MountUploadTimeoutError(TimeoutError):
    """Exists for code written for Modal; mesh has no mounts."""


class OutputExpiredError(TimeoutError):
    """The call finished, its result was kept for its time, and is gone."""


class SandboxTimeoutError(TimeoutError):
    """Exists for code written for Modal; mesh has no sandboxes."""


class VolumeUploadTimeoutError(TimeoutError):
    """Exists for code written for Modal."""


class UnimplementedError(Error):
    """Mesh does not do this (yet); the text names it."""


class VersionError(Error):
    """Two sides are too far apart in version; the text names both, and which to upgrade."""


class ModuleNotMountable(Exception):
    """Exists for code written for Modal; mesh ships source with the deploy instead of mounting it."""


class NotReadyError(builtins.TimeoutError):
    """`get(timeout=…)`: the call has no result yet. A builtin TimeoutError, as in Modal."""


class InputCancellation(BaseException):
    """Raised inside a running function that is cancelled or out of time, so that its `finally` blocks run.

    A BaseException, so that ``except Exception`` in the function does not swallow it.
    """


class DeprecationError(UserWarning):
    """A name Modal removed; the text gives the new one."""


class AsyncUsageWarning(UserWarning):
    """A blocking call was made inside a running event loop; it works, but stops the loop meanwhile: use `.aio`."""


class ServerWarning(UserWarning):
    """Something the server or a worker wants the caller to know."""


def simulate_preemption(wait_seconds: int, jitter_seconds: int = 0) -> None:
    """Send this process SIGINT after `wait_seconds` (plus up to `jitter_seconds`), to try how code takes preemption.

    Raises:
        InvalidError: `wait_seconds` is not positive.
    """
    if wait_seconds <= 0:
        raise InvalidError(f"simulate_preemption: wait_seconds must be above 0, not {wait_seconds}")
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, wait_seconds + random.random() * jitter_seconds)
