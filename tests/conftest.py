"""Fixtures: a real nats-server for the session, an environment for each test."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest

from mesh.nursery import Nursery
from mesh.server import NatsServer
from tests.support import Mesh, new_mesh

for _name in [name for name in os.environ if name.startswith("MESH_")]:
    del os.environ[_name]  # the tests' own settings, not those of whoever runs them

# The same examples at each run, and no time limit on one: neither luck nor a busy machine may fail an unchanged commit.
hypothesis.settings.register_profile("mesh", derandomize=True, deadline=None)
hypothesis.settings.load_profile("mesh")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One server for all tests that do not break it."""
    started = NatsServer.start(tmp_path_factory.mktemp("nats"), sync="2m")
    yield started
    started.kill()


@pytest.fixture(scope="session")
def _shared(server: NatsServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with new_mesh(server, tmp_path_factory.mktemp("shared")) as shared:
        shared.start_worker("--containers", "8")
        yield shared


@pytest.fixture
def mesh(_shared: Mesh) -> Iterator[Mesh]:
    """An environment with a worker, shared by tests that only call functions: each deploys apps of its own."""
    from mesh import client

    client.use_settings(_shared.settings)
    before = list(_shared.modules)  # the shared worker stays, the modules of a test go
    yield _shared
    _shared.forget(before)


@pytest.fixture
def own_mesh(server: NatsServer, tmp_path: Path) -> Iterator[Callable[..., Mesh]]:
    """Makes environments without workers, for this test alone."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(new_mesh(server, tmp_path, **settings))


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[..., NatsServer]]:
    """Starts servers that a test may kill."""
    started: list[NatsServer] = []

    def start(**options: object) -> NatsServer:
        store = tmp_path / f"nats-{len(started)}" if "store" not in options else Path(str(options.pop("store")))
        started.append(NatsServer.start(store, **{"sync": "2m", **options}))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
async def nursery() -> AsyncIterator[Nursery]:
    """Where containers without a worker come from; at the end nothing of them is left."""
    opened = Nursery()
    yield opened
    await opened.close()
