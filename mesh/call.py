"""FunctionCall: a handle on one call, whoever submitted it, in this process or another."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from mesh import context, serialization
from mesh._sync import both, both_generators, both_static
from mesh.exception import (
    DataLossError,
    DeserializationError,
    ExecutionError,
    NotFoundError,
    NotReadyError,
    OutputExpiredError,
    ServerWarning,
    UnimplementedError,
)
from mesh.payload import Blob, Buffer
from mesh.protocol import (
    SEVERAL,
    Address,
    CancelRequest,
    Failure,
    Format,
    Result,
    State,
    call_time,
    is_call_id,
)

# asyncio, nats and all that needs them are imported at first use: together they take four times as long as the rest.
if TYPE_CHECKING:
    from mesh.broker import Broker
    from mesh.broker.results import Waiter
    from mesh.status import CallStatus

R = TypeVar("R")

_SILENCE = 3.0  # seconds of waiting after which a caller is told that no worker is there
_FIRST_LOOK = 1.0  # seconds the first look may take, so that what is there is found however short the timeout
_LOOK_AGAIN = 30.0  # seconds between looks whether what is waited for can still come
_CLOCK_TOLERANCE = 60.0  # seconds by which a caller's clock may be off


class FunctionCall(Generic[R]):
    """A call that was submitted, whoever submitted it."""

    def __init__(self, call_id: str, *, environment: str | None = None, address: Address | None = None) -> None:
        """Not for users: `spawn` and `from_id` make these."""
        self._id = call_id
        self._environment = environment
        self._address = address

    @staticmethod
    def from_id(function_call_id: str, client: object = None) -> FunctionCall[Any]:
        """The handle on a call whose id is known. No I/O, and never fails: whether it exists shows at its first use."""
        return FunctionCall(function_call_id)

    @property
    def object_id(self) -> str:
        """The call's id, `fc-…`. Who knows it may read the result."""
        return self._id

    def __repr__(self) -> str:
        return f"mesh.FunctionCall({self._id!r})"

    def __reduce__(self) -> Any:
        return _call_handle, (self._id, self._environment)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionCall) and other._id == self._id

    def __hash__(self) -> int:
        return hash(self._id)

    async def _broker(self) -> Broker:
        from mesh import client

        here = context.container()
        return await client.broker(self._environment or (here.environment if here else None))

    @both
    async def get(self, /, timeout: float | None = None, *, index: int = 0) -> R:
        """The value the call returned. Reading it does not use it up.

        Args:
            timeout: seconds to wait for it; `None` waits as long as it can still come, 0 looks once.
            index: which input's, of a call with several.

        Raises:
            TimeoutError: the builtin one (a subclass, `NotReadyError`): there is no result yet.
            OutputExpiredError: it finished, and its result is gone.
            NotFoundError: there is no such call.
            Exception: what the call itself came to; see `Function.remote`.
        """
        broker = await self._broker()
        key = self._key(index)
        if timeout is not None and timeout <= 0:
            result = await self._read(broker, key) or await self._look(broker, index)
        else:
            with context.waiting_in_mesh():
                result = await self._read_or_wait(broker, key, timeout, index)
        if result is None:
            raise NotReadyError(f"call {self._id} has no result yet")
        return await self._value(broker, result)

    def _key(self, index: int) -> str:
        if not is_call_id(self._id):
            raise NotFoundError(f"there is no call {self._id!r}: a call's id is fc- and 26 characters")
        return f"{self._id}.{index}"

    async def _read(self, broker: Broker, key: str) -> Result | None:
        from mesh.broker import translated

        async with translated(f"reading the result of {self._id}"):
            return await (broker.results.answer(key) if self._address is None else broker.results.get(key))

    async def _read_or_wait(self, broker: Broker, key: str, timeout: float | None, index: int) -> Result:
        """Listen first, then read, then wait: whatever happens in between is not missed.

        Raises:
            NotReadyError: not within `timeout`, be it that the server is away.
        """
        import asyncio

        waiter = await broker.results.expect(key)
        try:
            async with asyncio.timeout(None if timeout is None else max(timeout, _FIRST_LOOK)):
                began = time.monotonic()
                found = await self._read_quietly(broker, key, index)
            async with asyncio.timeout(None if timeout is None else timeout - (time.monotonic() - began)):
                return found or await self._wait(broker, waiter, index)
        except TimeoutError:
            raise NotReadyError(f"call {self._id} has no result after {timeout:g} s") from None
        finally:
            waiter.close()

    async def _read_quietly(self, broker: Broker, key: str, index: int) -> Result | None:
        """The result if it is there, while the server may be away: a reconnect reads what is waited for."""
        from mesh.exception import ConnectionError as Unreachable

        try:
            found = await self._read(broker, key)
            return found if found or self._address else await self._look(broker, index)
        except Unreachable:
            return None

    async def _wait(self, broker: Broker, waiter: Waiter, index: int = 0, *, caller: bool = False) -> Result:
        """The result, once it is pushed. Looks at times whether it can still come.

        Args:
            caller: the call ends with whoever waits here, who therefore says now and then that it is alive.

        Raises:
            NotFoundError, OutputExpiredError: it cannot come any more.
        """
        found = await waiter.wait(_SILENCE)
        if found is None:
            with broker.clients.waiting() if caller else contextlib.nullcontext():
                await self._warn_without_worker(broker)
                while found is None:
                    found = await waiter.wait(_LOOK_AGAIN) or await self._look_quietly(broker, index)
        return found

    async def _look_quietly(self, broker: Broker, index: int) -> Result | None:
        """`_look`, while the server may be away: then there is nothing to see, and waiting goes on."""
        from mesh.exception import ConnectionError as Unreachable

        try:
            return await self._look(broker, index)
        except Unreachable:
            return None

    async def _look(self, broker: Broker, index: int) -> Result | None:
        """The result if it is there by now, `None` if it can still come.

        Looks in the order in which a call moves, so that it cannot slip past: the queue, then the results.

        Raises:
            NotFoundError, OutputExpiredError: neither is the case.
        """
        from mesh.broker import translated

        async with translated(f"looking for {self._id}"):
            there, result = await self._there(broker, index)
            if not there and await self._was_submitted(broker, index):
                there, result = await self._there(broker, index)  # it may have come, and ended, since the first look
                if not there:
                    raise await self._gone(broker)
            return result

    async def _there(self, broker: Broker, index: int) -> tuple[bool, Result | None]:
        """Whether the mesh has the input, queued or ended, and its result if there is one."""
        queued = await broker.calls.find(self._id, index, at=self._address)
        if queued is not None and queued.headers.get("Mesh-Kind", "") not in SEVERAL:
            return True, None
        result = await broker.results.answer(self._key(index))
        return queued is not None or result is not None, result

    async def _was_submitted(self, broker: Broker, index: int) -> bool:
        """Whether an input was submitted that is neither queued nor has ended; false if that is still to come.

        Raises:
            NotFoundError, OutputExpiredError: neither, as far as anybody knows.
        """
        record = await broker.several.get(self._id)
        if record is None:
            raise await self._gone(broker) if index == 0 else NotFoundError(f"there is no input {index} of {self._id}")
        if record.count is None and await broker.several.is_being_submitted(record):
            return False
        inputs = await broker.several.inputs_of(record)
        if index < inputs:
            return True
        cut = "" if record.count is not None else ": who submitted it has gone half-way"
        raise NotFoundError(f"call {self._id} has {inputs:,} inputs, and none with the index {index:,}{cut}")

    async def _gone(self, broker: Broker) -> Exception:
        max_age = await broker.max_age()
        age = time.time() - call_time(self._id)
        if age > max_age:
            return OutputExpiredError(f"the result of call {self._id} was kept for {max_age:g} s, and is gone")
        if age < -_CLOCK_TOLERANCE:
            return NotFoundError(f"there is no call {self._id}: its time lies in the future")
        return NotFoundError(
            f"there is no call {self._id} in environment {broker.topology.environment!r}: it was never accepted, or "
            "its result was kept for a shorter time (`remote` keeps it an hour, `result_ttl=` as long as it says)"
        )

    async def _warn_without_worker(self, broker: Broker) -> None:
        """After some seconds of silence: say so if nobody is there to run the call."""
        from mesh.status import why_waiting

        with contextlib.suppress(Exception):  # only a hint; the wait itself finds out what is wrong
            reason = await why_waiting(broker, self._address)
            if reason:
                warnings.warn(f"call {self._id} waits: {reason}", ServerWarning, stacklevel=2)

    async def _value(self, broker: Broker, result: Result) -> R:
        """The value in a result, or the exception it stands for, raised."""
        if result.state is not State.SUCCEEDED:
            failure = Failure.decode(result.body)
            if result.blob is not None and broker.settings.unpickle:
                with contextlib.suppress(DataLossError):  # without it, its text has to do
                    failure = replace(failure, pickle=bytes(await self._fetched(broker, result.blob)))
            raise serialization.unpack_exception(failure, unpickle=broker.settings.unpickle)
        body = result.body if result.blob is None else await self._fetched(broker, result.blob)
        return cast(R, self._decoded(broker, "the result", result.format, body))

    async def _fetched(self, broker: Broker, blob: Blob) -> memoryview:
        """A large payload, in memory of its own: arrays stay where they were put, and give it back when they go.

        Raises:
            DataLossError: it is not there any more, or is not what was stored.
        """
        import mmap

        from mesh.broker import translated

        memory = mmap.mmap(-1, blob.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        async with translated(f"reading the result of {self._id}"):
            try:
                await broker.blobs.get(blob, memory.write)
            except NotFoundError as error:
                raise DataLossError(
                    f"the result of call {self._id} is there, and its payload is not: {error}"
                ) from None
        return memoryview(memory)

    def _decoded(self, broker: Broker, what: str, format: Format, body: Buffer) -> Any:
        """Something the function gave, as an object."""
        if format in (Format.PICKLE, Format.BUFFERS) and not broker.settings.unpickle:
            raise DeserializationError(f"{what} of {self._id} is a pickle, and MESH_UNPICKLE forbids reading those")
        try:
            return serialization.decode(format, body)
        except DeserializationError as error:
            raise ExecutionError(f"{what} of {self._id} cannot be read here: {error}") from error

    @both
    async def status(self, /, *, index: int | None = None) -> CallStatus:
        """What has become of the call: state, attempts, times, worker, last error. Does not read its value.

        Of a call of several inputs also how many of them are `outstanding`, `done`, `failed` and `cancelled`; its state
        is that of the first that has not ended.

        Args:
            index: of this input alone.

        Raises:
            NotFoundError, OutputExpiredError: as `get`.
        """
        from mesh.broker import translated
        from mesh.status import find_call, find_status

        broker = await self._broker()
        self._key(index or 0)
        async with translated(f"looking for {self._id}"):
            if index is None and self._address is None:
                found = await find_call(broker, self._id)
            else:
                found = await find_status(broker, self._id, index or 0, at=self._address)
        if found is None:
            raise await self._gone(broker)
        return found

    @both
    async def num_inputs(self, /) -> int:
        """How many inputs the call has: 1 for `spawn` and `remote`, of others as many as were submitted so far.

        Raises:
            NotFoundError, OutputExpiredError: as `get`.
        """
        from mesh.broker import translated

        if self._address is not None:
            return 1
        broker = await self._broker()
        self._key(0)
        async with translated(f"looking for {self._id}"):
            if (record := await broker.several.find(self._id)) is not None:
                return await broker.several.inputs_of(record)
            await self._look(broker, 0)
        return 1

    @both_generators
    def iter(self, /, *, start: int = 0, end: int | None = None) -> AsyncGenerator[list[R], None]:
        """The values of the inputs in their order, from `start` to before `end`, each once it is there: `for value in
        call.iter()`, or `async for value in call.iter.aio()`. Without `end` to the last, of a call that is still being
        submitted as it comes. Any process may do it, and begin again where it left off.

        Raises:
            ValueError: there is no such range.
            Exception: what an input raised, in its place; `RemoteError` where it was cancelled. Also what `get` raises:
                where its submitter went half-way, `NotFoundError` behind the last input.
        """
        from mesh.iterating import outputs_of

        if start < 0 or (end is not None and end < start):
            raise ValueError(f"inputs are counted from 0: start {start} and end {end} make no range")
        return outputs_of(self, start, end)

    @both_static
    @staticmethod
    async def gather(*calls: FunctionCall[Any], return_exceptions: bool = False) -> list[Any]:
        """The values of several calls, in their order.

        Args:
            return_exceptions: give what a failed call raised in its place, instead of raising the first one.
        """
        import asyncio

        values = await asyncio.gather(*(call.get.aio() for call in calls), return_exceptions=return_exceptions)
        return list(values)

    @both
    async def cancel(self, /, terminate_containers: bool = False) -> None:
        """End the call, wherever it is: queued, running, or waiting for another try. It is not tried again.
        Of a call of several inputs, all end.

        Returns once nothing of it runs. A call that has ended already stays as it is. `get` raises `RemoteError`
        afterwards. Code that runs gets an `InputCancellation` (async: `CancelledError`) and has time for its `finally`.

        Other inputs in its container go on. Where it cannot be interrupted (a thread in C code, a task that swallows
        its cancel), it is given up after the grace (30 s): it ends as cancelled, the container takes no more inputs,
        and is killed when the others have ended. Of a batch one input is cancelled alone; the run is interrupted with
        the last. In Modal, cancelling one of several sync inputs ends its container.

        Args:
            terminate_containers: kill its container at once instead; other inputs in it go back to the queue.

        Raises:
            NotFoundError, OutputExpiredError: as `get`.
            ServiceError: its worker has not ended it within 90 s.
        """
        from mesh.broker import translated

        broker = await self._broker()
        self._key(0)
        async with translated(f"cancelling {self._id}"):
            if await self._cancel(broker, terminate_containers) is None:
                raise await self._gone(broker)

    async def _cancel(self, broker: Broker, terminate: bool = False) -> State | None:
        from mesh.cancel import cancel_call, cancel_input

        request = CancelRequest(reason=f"by {broker.client}", terminate=terminate)
        if self._address is None:
            return await cancel_call(broker, self._id, request=request)
        return await cancel_input(broker, self._id, request=request, at=self._address)

    async def _cancel_behind(self, broker: Broker) -> None:
        """Cancel because the caller goes."""
        from mesh.behind import behind

        await behind(broker, self._cancel)

    # --- what later issues build -------------------------------------------------------------------------------------

    def get_call_graph(self) -> Any:
        """Not built yet."""
        raise UnimplementedError("FunctionCall.get_call_graph is not built yet")


def _call_handle(call_id: str, environment: str | None) -> FunctionCall[Any]:
    return FunctionCall(call_id, environment=environment)
