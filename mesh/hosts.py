"""Which names of hosts lead to which web functions: what a deploy asks for, and what it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mesh.exception import ConflictError, InvalidError
from mesh.protocol import class_of
from mesh.records import AppHead, AppState, FunctionRecord, HostRecord

if TYPE_CHECKING:
    from mesh.broker import Broker


async def claims(broker: Broker, head: AppHead, records: Sequence[FunctionRecord]) -> dict[str, tuple[HostRecord, int]]:
    """The records that give the web functions of a deployment their names of hosts, each with the sequence of the one
    that it replaces.

    An app of a single run takes over what another one has: it is the newer that is being looked at.

    Raises:
        InvalidError: two of these functions ask for one name.
        ConflictError: a function of another app has one of them.
    """
    wanted: dict[str, HostRecord] = {}
    for host, function in _asked_for(head, records):
        other = wanted.setdefault(host, HostRecord(app=head.app, function=function))
        if other.function != function:
            raise InvalidError(
                f"{other.function!r} and {function!r} both ask for the host {host!r}: give one of them another label="
            )
    if not wanted:
        return {}
    found = await broker.hosts.read(wanted)
    for host, (other, _) in found.items():
        if other.app != head.app and await _holds(broker, host, other, head.state):
            raise ConflictError(
                f"the host {host!r} leads to function {other.function!r} of app {other.app!r} already: give "
                f"{wanted[host].function!r} another label=, or stop that app"
            )
    return {host: (record, found[host][1] if host in found else 0) for host, record in wanted.items()}


def _asked_for(head: AppHead, records: Sequence[FunctionRecord]) -> list[tuple[str, str]]:
    return [
        (host, function)
        for record in records
        for function, web in record.spec.webs.items()
        for host in web.hosts(head.app, head.name, function)
    ]


async def _holds(broker: Broker, host: str, claim: HostRecord, state: AppState) -> bool:
    """Whether a name is still that of the function which it was given to, and cannot be taken from it."""
    head, _ = await broker.registry.head(claim.app)
    if head is None or head.state is AppState.STOPPED or state is head.state is AppState.EPHEMERAL:
        return False
    if class_of(claim.function) not in head.functions:
        return False
    record = await broker.registry.function(claim.app, class_of(claim.function))
    return record is not None and (host, claim.function) in _asked_for(head, [record])
