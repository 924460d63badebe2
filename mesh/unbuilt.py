"""Names of Modal's API that mesh does not have yet: they can be imported, and say what they are when used."""

from __future__ import annotations

from typing import Any, NoReturn

from mesh.exception import UnimplementedError


def _refuse(name: str) -> NoReturn:
    raise UnimplementedError(f"mesh.{name} is not built yet")


class _Unbuilt(type):
    """A class none of whose attributes can be used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse(f"{cls.__name__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        _refuse(cls.__name__)


class Client(metaclass=_Unbuilt):
    """Not built yet: settings say which server is used."""


class CloudBucketMount(metaclass=_Unbuilt):
    """Only Modal's cloud has it."""


class Dict(metaclass=_Unbuilt):
    """Not built yet."""


class Environment(metaclass=_Unbuilt):
    """Not built yet: `environment_name=` and MESH_ENVIRONMENT choose one."""


class NetworkFileSystem(metaclass=_Unbuilt):
    """Only Modal's cloud has it."""


class Proxy(metaclass=_Unbuilt):
    """Only Modal's cloud has it."""


class Queue(metaclass=_Unbuilt):
    """Not built yet."""


class Sandbox(metaclass=_Unbuilt):
    """Only Modal's cloud has it."""


class Tunnel(metaclass=_Unbuilt):
    """Only Modal's cloud has it."""


class Volume(metaclass=_Unbuilt):
    """Not built yet."""


class Workspace(metaclass=_Unbuilt):
    """Only Modal's cloud has it."""


class billing(metaclass=_Unbuilt):  # noqa: N801 - a module in Modal
    """Only Modal's cloud has it."""


def forward(*args: Any, **options: Any) -> Any:
    """Only Modal's cloud has it."""
    _refuse("forward")


def web_endpoint(*args: Any, **options: Any) -> Any:
    """Gone from Modal, too: the name is `fastapi_endpoint`."""
    from mesh.exception import DeprecationError

    raise DeprecationError("web_endpoint is gone; use fastapi_endpoint")
