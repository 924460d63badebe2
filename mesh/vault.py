"""Secrets of an environment: stored sealed, opened by workers alone, and sealed anew when the key is changed."""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mesh.exception import (
    AlreadyExistsError,
    ConflictError,
    DataLossError,
    InvalidError,
    NotFoundError,
    PermissionDeniedError,
)
from mesh.records import SecretRecord
from mesh.sealing import Keys, seal
from mesh.secretref import SecretRef, check_env
from mesh.spec import check_name

if TYPE_CHECKING:
    from mesh.broker import Broker

_TRIES = 10  # at a write that somebody else came before


class NotHere(NotFoundError):
    """What a container needs is not to be had on this worker, or not now: its calls wait."""


# --- who seals -------------------------------------------------------------------------------------------------------


async def _public_key(broker: Broker) -> str:
    public, _ = await broker.secrets.public_key()
    if not public:
        where = broker.topology.environment
        raise NotFoundError(
            f"environment {where!r} has no key to seal secrets to: run `mesh init --env {where}` (`mesh up` does it, "
            "too), and give the key file it makes to the workers"
        )
    return public


def _sealed(public: str, name: str, values: Mapping[str, str]) -> SecretRecord:
    return SecretRecord(
        name=name,
        sealed={variable: seal(public, value) for variable, value in sorted(values.items())},
        public=public,
        made_at=time.time(),
        made_by=_who(),
    )


def _who() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except Exception:  # noqa: BLE001 - no such user in a container
        return socket.gethostname()


async def create(broker: Broker, name: str, values: Mapping[str, str], *, replacing: bool) -> None:
    """Store a secret under a name.

    Raises:
        AlreadyExistsError: there is one, and it is not to be replaced. InvalidError: what cannot be variables.
        NotFoundError: the environment has no key.
    """
    check_name("secret", name)
    check_env(values, f"secret {name!r}")
    if not values:
        raise InvalidError(f"secret {name!r} would have no variables: give at least one, KEY=value")
    record, key = _sealed(await _public_key(broker), name, values), broker.topology.secret_key(name)
    if not await broker.secrets.put(key, record, None if replacing else 0):
        raise AlreadyExistsError(
            f"secret {name!r} exists in environment {broker.topology.environment!r}; `mesh secret create "
            "--force` replaces it, Secret.update changes it"
        )


async def update(broker: Broker, name: str, values: Mapping[str, str]) -> None:
    """Add variables to a secret, or replace them; the others stay.

    Raises:
        NotFoundError: there is no such secret. ConflictError: others change it all the time.
    """
    check_env(values, f"secret {name!r}")
    key = broker.topology.secret_key(name)
    for _ in range(_TRIES):
        record, sequence = await broker.secrets.get(key)
        if record is None:
            raise NotFoundError(_missing(broker, name))
        fresh = _sealed(await _public_key(broker), name, values)
        if fresh.public != record.public:
            raise ConflictError(f"the key is being changed; update {name!r} once `mesh secret rotate` has ended")
        merged = replace(record, sealed={**record.sealed, **fresh.sealed}, made_at=fresh.made_at, made_by=fresh.made_by)
        if await broker.secrets.put(key, merged, sequence):
            return
    raise ConflictError(f"secret {name!r} is being changed by others; try again")


async def delete(broker: Broker, name: str) -> None:
    """Forget a secret.

    Raises:
        NotFoundError: there is none.
    """
    record, sequence = await broker.secrets.get(broker.topology.secret_key(name))
    if record is None or not await broker.secrets.delete(sequence):
        raise NotFoundError(_missing(broker, name))


def _missing(broker: Broker, name: str) -> str:
    where = broker.topology.environment
    return f"there is no secret {name!r} in environment {where!r}: `mesh secret create {name} KEY=value` makes it"


async def look_up(broker: Broker, ref: SecretRef) -> SecretRecord:
    """A secret with a name, which has what is required of it.

    Raises:
        NotFoundError: it does not, or there is none.
    """
    record, _ = await broker.secrets.get(broker.secrets.key(ref))
    return _checked(broker, ref, record)


def _checked(broker: Broker, ref: SecretRef, record: SecretRecord | None) -> SecretRecord:
    if record is None:
        own = "a secret of its source is stored no more; deploy it again"
        raise NotFoundError(_missing(broker, ref.name) if ref.name else own)
    missing = [variable for variable in ref.required if variable not in record.sealed]
    if missing:
        raise NotFoundError(f"secret {ref.name!r} has no {', '.join(missing)}: it has {', '.join(record.sealed)}")
    return record


async def ship(broker: Broker, refs: Collection[SecretRef]) -> None:
    """See that all of these are there for workers: those with values are sealed and stored, the others looked up.

    Raises:
        NotFoundError: there is no such secret, or not with what is required; or there is no key.
        InvalidError: one of another environment.
    """
    for ref in refs:
        if ref.environment and ref.environment != broker.topology.environment:
            raise InvalidError(
                f"secret {ref.name!r} is of environment {ref.environment!r}; functions of "
                f"{broker.topology.environment!r} can only have secrets of their own"
            )
        if ref.values is None:
            await look_up(broker, ref)
        else:
            await _ship_values(broker, ref, ref.values)


async def _ship_values(broker: Broker, ref: SecretRef, values: Mapping[str, str]) -> None:
    key, public = broker.secrets.key(ref), await _public_key(broker)
    record, _ = await broker.secrets.get(key)
    if record is None or record.public != public:
        await broker.secrets.put(key, _sealed(public, "", values))


# --- who opens -------------------------------------------------------------------------------------------------------


async def values_of(broker: Broker, refs: Collection[SecretRef], key_file: Path, worker: str) -> dict[str, str]:
    """The variables of these secrets; of two with one name the later counts.

    Raises:
        NotHere: one is missing, or this worker cannot read it; the text names it, and says what to do.
    """
    if not refs:
        return {}
    try:
        keys = Keys.load(key_file)
    except (NotFoundError, InvalidError) as error:
        raise NotHere(f"it needs secrets, and worker {worker} cannot read any: {error}") from None
    found, values = await broker.secrets.get_many(refs), dict[str, str]()
    for ref in refs:
        try:
            record = _checked(broker, ref, found.get(broker.secrets.key(ref)))
            values |= {variable: keys.open(sealed) for variable, sealed in record.sealed.items()}
        except NotFoundError as error:
            raise NotHere(str(error)) from None
        except DataLossError as error:
            what = f"secret {ref.name!r}" if ref.name else "a secret of its source"
            raise NotHere(f"worker {worker} cannot read {what}: {error} ({key_file})") from None
    return values


# --- the key ---------------------------------------------------------------------------------------------------------


async def establish(broker: Broker, key_file: Path) -> bool:
    """See that the environment has a key to seal to. Returns whether a key file was made for it.

    Raises:
        PermissionDeniedError: its secrets are sealed to a key that is not in the file.
        InvalidError: the file is no key file.
    """
    if (await broker.secrets.public_key())[0]:
        return False
    stored = [await broker.secrets.get(key) for key in await broker.secrets.keys()]
    try:
        keys, made = Keys.load(key_file), False
    except NotFoundError:
        keys, made = Keys.new(), True
    strange = {record.public for record, _ in stored if record is not None} - set(keys.publics)
    if strange:
        raise PermissionDeniedError(
            f"the secrets of environment {broker.topology.environment!r} are sealed to a key that is not in "
            f"{key_file}: run this where that key file is"
        )
    if made:
        keys.save(key_file)
    await broker.secrets.publish_key(keys.public, 0)
    return made


async def rotate(broker: Broker, key_file: Path) -> int:
    """Make a new key, and seal everything anew to it; returns how many secrets. The file keeps the key before, too.

    Raises:
        NotFoundError, InvalidError: no key file. PermissionDeniedError: not that of this environment.
        ConflictError: somebody else does the same.
    """
    keys = Keys.load(key_file)
    public, sequence = await broker.secrets.public_key()
    if public not in keys.publics:
        raise PermissionDeniedError(
            f"{key_file} is not the key of environment {broker.topology.environment!r}: run this where that key file is"
        )
    if public == keys.public:  # else a rotation was broken off before it was published
        keys = keys.after(Keys.new())
        keys.save(key_file)
    if not await broker.secrets.publish_key(keys.public, sequence):
        raise ConflictError("somebody else changed the key at the same moment; copy their key file here")
    count = 0
    for _ in range(2):  # the second time what was sealed to the old key meanwhile
        count += await _seal_anew(broker, keys)
    return count


async def _seal_anew(broker: Broker, keys: Keys) -> int:
    count = 0
    for key in await broker.secrets.keys():
        for _ in range(_TRIES):
            record, sequence = await broker.secrets.get(key)
            if record is None or record.public == keys.public:
                break
            opened = {variable: keys.open(sealed) for variable, sealed in record.sealed.items()}
            sealed = {variable: seal(keys.public, value) for variable, value in opened.items()}
            if await broker.secrets.put(key, replace(record, sealed=sealed, public=keys.public), sequence):
                count += 1
                break
    return count
