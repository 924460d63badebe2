"""Secrets as users write them: variables for the containers of the functions that name them, and for nobody else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh import context
from mesh._sync import both
from mesh.exception import AlreadyExistsError, InvalidError, NotFoundError
from mesh.secretref import SecretRef, check_env
from mesh.spec import check_environment, check_name

if TYPE_CHECKING:
    from mesh.broker import Broker


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretInfo:
    """What is known of a secret without opening it.

    Attributes:
        created_at: in seconds since 1970; of the last change. created_by: user and machine. keys: its variables.
    """

    name: str
    created_at: float
    created_by: str
    keys: tuple[str, ...]


class Secret:
    """Variables that only the containers of functions get which name it in `secrets=`. Make one with `from_…`."""

    def __init__(self, ref: SecretRef) -> None:
        """Not for users: `Secret.from_name` and its like make secrets."""
        if not isinstance(ref, SecretRef):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
            raise InvalidError("Secret(…) cannot be called: use Secret.from_name, from_dict or from_dotenv")
        self.ref = ref

    # --- where they come from ----------------------------------------------------------------------------------------

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        environment_name: str | None = None,
        required_keys: Sequence[str] = (),
        client: object = None,
    ) -> Secret:
        """One that is stored on the mesh, by `mesh secret create` or `Secret.objects.create`. No I/O.

        Args:
            required_keys: variables it must have: if it lacks one, whatever names it is not deployed.

        Raises:
            InvalidError: a name that cannot be one.
        """
        environment = "" if environment_name is None else check_environment(environment_name)
        required = tuple(required_keys)
        return cls(SecretRef(name=check_name("secret", name), required=required, environment=environment))

    @classmethod
    def from_dict(cls, env_dict: Mapping[str, str | None]) -> Secret:
        """One without a name: its values are sealed when what names it is deployed. `None` values are left out.

        Raises:
            InvalidError: what cannot be variables.
        """
        if not isinstance(env_dict, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
            raise InvalidError(f"Secret.from_dict takes a dict of strings, not {type(env_dict).__name__}")
        values = {variable: value for variable, value in env_dict.items() if value is not None}
        check_env(values, "Secret.from_dict")
        return cls(SecretRef(values=values))

    @classmethod
    def from_dotenv(cls, path: object = None, *, filename: str = ".env", client: object = None) -> Secret:
        """The variables of a `.env` file: of the working directory or one above it; or from that of `path` upwards,
        for which `__file__` does. In a container, where such a file has no place, it is empty.

        Raises:
            NotFoundError: there is no such file. InvalidError: what cannot be variables.
        """
        if not context.is_local():
            return cls(SecretRef(values={}))
        start = Path.cwd() if path is None else Path(str(path)).resolve()
        found = next((file for folder in (start, *start.parents) if (file := folder / filename).is_file()), None)
        if found is None:
            raise NotFoundError(f"there is no file {filename!r} in {start}, nor above it")
        return cls.from_dict(read_dotenv(found))

    @classmethod
    def from_local_environ(cls, env_keys: Sequence[str]) -> Secret:
        """Variables of this process. In a container, which has others, it is empty.

        Raises:
            InvalidError: one of them is not set.
        """
        if not context.is_local():
            return cls(SecretRef(values={}))
        missing = [variable for variable in env_keys if variable not in os.environ]
        if missing:
            raise InvalidError(f"Secret.from_local_environ: {', '.join(missing)} not set in this process")
        return cls.from_dict({variable: os.environ[variable] for variable in env_keys})

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """Its name; `None` for one that came with source."""
        return self.ref.name or None

    @both
    async def hydrate(self, /, client: object = None) -> Secret:
        """Look it up now, instead of when something that names it is deployed.

        Raises:
            NotFoundError: there is none, or not with the keys that are required.
        """
        await self._record()
        return self

    @both
    async def info(self, /) -> SecretInfo:
        """What is known of it without opening it.

        Raises:
            NotFoundError: there is none. InvalidError: it has no name.
        """
        record = await self._record()
        return SecretInfo(
            name=record.name, created_at=record.made_at, created_by=record.made_by, keys=tuple(sorted(record.sealed))
        )

    @both
    async def update(self, /, env_dict: Mapping[str, str | None]) -> None:
        """Add variables, or replace them; the others stay. Containers that run keep what they were started with.

        Raises:
            NotFoundError: there is no such secret. InvalidError: it has no name, or what cannot be variables.
        """
        from mesh import vault

        values = {variable: value for variable, value in env_dict.items() if value is not None}
        await vault.update(await self._broker(), self.ref.name, values)

    async def _record(self) -> Any:
        from mesh import vault

        return await vault.look_up(await self._broker(), self.ref)

    async def _broker(self) -> Broker:
        from mesh import client

        if not self.ref.name:
            raise InvalidError("this secret has no name: it exists only for the functions that were deployed with it")
        return await client.broker(self.ref.environment or None)

    def __repr__(self) -> str:
        if self.ref.name:
            return f"mesh.Secret.from_name({self.ref.name!r})"
        return f"<mesh.Secret of {', '.join(sorted(self.ref.values or ())) or 'nothing'}>"

    def __reduce__(self) -> Any:
        if not self.ref.name:
            raise InvalidError(
                "a secret without a name cannot be sent: its values would be in the call for all to read"
            )
        return _named, (self.ref.name, self.ref.required, self.ref.environment)

    objects: SecretManager


def _named(name: str, required: tuple[str, ...], environment: str) -> Secret:
    return Secret(SecretRef(name=name, required=required, environment=environment))


def read_dotenv(path: Path) -> dict[str, str | None]:
    """The variables of a `.env` file."""
    from dotenv import dotenv_values

    return dict(dotenv_values(path))


class SecretManager:
    """`Secret.objects`: the secrets that are stored on the mesh."""

    @both
    async def create(
        self,
        /,
        name: str,
        env_dict: Mapping[str, str],
        *,
        allow_existing: bool = False,
        environment_name: str | None = None,
        client: object = None,
    ) -> None:
        """Store a secret.

        Args:
            allow_existing: leave one of this name as it is.

        Raises:
            AlreadyExistsError: there is one. NotFoundError: the environment has no key to seal to.
            InvalidError: what cannot be a name, or variables.
        """
        from mesh import client as connections
        from mesh import vault

        broker = await connections.broker(environment_name)
        try:
            await vault.create(broker, name, dict(env_dict), replacing=False)
        except AlreadyExistsError:
            if not allow_existing:
                raise

    @both
    async def list(
        self,
        /,
        *,
        max_objects: int | None = None,
        environment_name: str | None = None,
        client: object = None,
    ) -> Sequence[Secret]:
        """The secrets of an environment, by name."""
        from mesh import client as connections

        records = await (await connections.broker(environment_name)).secrets.named()
        return [Secret.from_name(r.name, environment_name=environment_name) for r in records[:max_objects]]

    @both
    async def delete(
        self,
        /,
        name: str,
        *,
        allow_missing: bool = False,
        environment_name: str | None = None,
        client: object = None,
    ) -> None:
        """Forget a secret. Containers that run keep its variables; calls that need another one wait.

        Raises:
            NotFoundError: there is none.
        """
        from mesh import client as connections
        from mesh import vault

        try:
            await vault.delete(await connections.broker(environment_name), name)
        except NotFoundError:
            if not allow_missing:
                raise


Secret.objects = SecretManager()
