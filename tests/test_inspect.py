"""docs/inspect.md answers its questions: here through the API requests that the `nats` command makes of its words."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import nats
import nats.errors
import pytest

from mesh import FunctionCall
from mesh.broker import Broker
from mesh.broker.connection import Stored
from mesh.config import Settings
from mesh.exception import AuthError, PermissionDeniedError
from mesh.protocol import Address, Input, new_call_id, new_client_token
from mesh.server import NatsServer, find_nats_server
from tests.documented import Facts, check
from tests.support import ROOT, Mesh, new_mesh, until


def as_text(stored: Stored | None) -> str:
    """A message as `nats stream get` prints it: headers, then the body."""
    if stored is None:
        return ""
    return "\n".join([f"{k}: {v}" for k, v in stored.headers.items()]) + "\n\n" + stored.body.decode("utf-8", "replace")


async def answer(broker: Broker, words: list[str]) -> str:
    """What a `nats` command asks the server, and what it is told."""
    api = broker.connection.api
    match words:
        case ["consumer", "report", stream]:
            return "\n".join(consumer["name"] for consumer in (await api(f"CONSUMER.LIST.{stream}"))["consumers"])
        case ["consumer", "info", stream, consumer]:
            return str(await api(f"CONSUMER.INFO.{stream}.{consumer}"))
        case ["stream", "subjects", stream, *filter]:
            return "\n".join(await broker.connection.subjects(stream, filter[0] if filter else ">"))
        case ["stream", "get", stream, "-S", subject]:
            return as_text(await broker.connection.get(stream, subject))
        case ["kv", "get", bucket, key, "--raw"]:
            found = await broker.connection.get(f"KV_{bucket}", f"$KV.{bucket}.{key}")
            return found.body.decode() if found else ""
        case ["kv", "ls", bucket]:
            return "\n".join(await broker.connection.subjects(f"KV_{bucket}", f"$KV.{bucket}.>"))
        case ["kv", "history", bucket, key]:
            found = await broker.connection.get_range(f"KV_{bucket}", 1, 100, f"$KV.{bucket}.{key}")
            return "\n".join(as_text(entry) for entry in found)
        case ["pub", subject, body]:
            await broker.connection.publish(subject, body.encode())
            return ""
        case _:
            raise AssertionError(f"no request is known for {words}")


def test_every_documented_command_answers_its_question(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    facts = Facts.make(mesh)
    root = mesh.ask(_root)
    check(facts, root, lambda words: mesh.ask(lambda broker: answer(broker, words)))


async def _root(broker: Broker) -> str:
    return broker.topology.root


def test_what_is_listened_to_arrives(own_mesh: Callable[..., Mesh]) -> None:
    """`nats sub 'mesh.log.shop.>'`, `nats sub 'mesh.done.>'`, and both of `mesh.flow`."""
    mesh = own_mesh()
    Facts.make(mesh)
    heard: list[tuple[str, bytes]] = []

    async def listen(broker: Broker) -> None:
        async def hear(message: object) -> None:
            heard.append((message.subject, message.data))  # type: ignore[attr-defined]

        for subject in ("log.shop.>", "done.>", "flow.*.*.out", "flow.*.*.credit"):
            await broker.connection.subscribe(f"{broker.topology.root}.{subject}", hear)
        await broker.connection.flush()

    mesh.ask(listen)
    from mesh import Function

    call = Function.from_name("shop", "send_invoice").spawn(3)
    head, token = call.object_id[:-8], call.object_id[-8:]
    until(
        lambda: any(s.endswith(f".done.{head}.{token}.0") and d == b'{"sent":3}' for s, d in heard), what="the result"
    )
    assert any(s.endswith(f"send_invoice.{call.object_id}.0") and d == b"sending 3\n" for s, d in heard)
    assert list(Function.from_name("shop", "pages").remote_gen(2000)) == list(range(2000))
    out = b"".join(d for s, d in heard if s.endswith(".0.out"))
    assert out.startswith(b"\x92\x00\xc4\x010\x92\x00\xc4\x011"), "the first two items, 0 and 1 as JSON"
    assert any(s.endswith(".0.credit") and int(d) > 16 for s, d in heard)


def test_a_call_over_a_raw_socket(own_mesh: Callable[..., Mesh]) -> None:
    """The bytes that `nats pub` sends: no client library, no header, and its JSON result readable with a `kv get`."""
    mesh = own_mesh()
    Facts.make(mesh)
    call = new_call_id(new_client_token())
    body = b'{"args": [5], "kwargs": {}}'
    with socket.create_connection(("127.0.0.1", mesh.server.port)) as connection:
        connection.recv(4096)
        connection.sendall(b'CONNECT {"verbose":false}\r\n')
        subject = f"{mesh.ask(_root)}.call.shop.send_invoice._.{call}.0"
        connection.sendall(f"PUB {subject} {len(body)}\r\n".encode() + body + b"\r\nPING\r\n")
        assert b"PONG" in connection.recv(4096)
    assert FunctionCall.from_id(call).get(timeout=20) == {"sent": 5}
    words = ["kv", "get", f"{mesh.ask(_root)}_results", f"{call}.0", "--raw"]
    assert mesh.ask(lambda broker: answer(broker, words)) == '{"sent":5}'


# --- deploy/nats.conf ------------------------------------------------------------------------------------------------


@pytest.fixture
def production(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A server on deploy/nats.conf itself, with another place for its data and port; gives its URLs by user."""
    passwords = {f"MESH_{user}PASSWORD": f"x{secrets.token_hex(8)}" for user in ("", "CONTAINER_", "VIEWER_")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (ROOT / "deploy" / "nats.conf").read_text()
    for original, here in (
        ("0.0.0.0:4222", f"127.0.0.1:{port}"),
        ('"/var/lib/mesh"', f'"{tmp_path / "js"}"'),
        ("50GB", "2GB"),
    ):
        assert original in text
        text = text.replace(original, here)
    config = tmp_path / "nats.conf"
    config.write_text(text)
    process = subprocess.Popen(
        [find_nats_server(), "-c", config], env={**os.environ, **passwords}, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: _answers(port), what="the server answers")
        names = {"mesh": "", "container": "CONTAINER_", "viewer": "VIEWER_"}
        yield {u: f"nats://{u}:{passwords[f'MESH_{n}PASSWORD']}@127.0.0.1:{port}" for u, n in names.items()}
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


NESTED = """
    import mesh
    app = mesh.App("production")

    @app.function()
    def inner(x):
        return x + 1

    @app.function()
    def outer(x):
        return inner.remote(x) * 10

    @app.function()
    def secrets():
        import os
        return [value for value in os.environ.values() if "mesh:" in value]
"""


def test_the_production_configuration(production: dict[str, str], tmp_path: Path, server: NatsServer) -> None:
    with new_mesh(server, tmp_path, nats_url=production["mesh"], environment="main") as mesh:
        module = mesh.deploy(NESTED)
        mesh.start_worker(MESH_CONTAINER_URL=production["container"])
        assert module.outer.remote(4) == 50
        assert module.secrets.remote() == []


def test_nested_calls_without_a_url_for_containers(
    production: dict[str, str], tmp_path: Path, server: NatsServer
) -> None:
    with new_mesh(server, tmp_path, nats_url=production["mesh"], environment="main") as mesh:
        module = mesh.deploy(NESTED)
        mesh.start_worker()
        assert module.inner.remote(1) == 2
        with pytest.raises(AuthError, match="the worker has no MESH_CONTAINER_URL"):
            module.outer.remote(4)
        assert module.secrets.remote() == []


def test_a_viewer_reads_everything_and_changes_nothing(
    production: dict[str, str], tmp_path: Path, server: NatsServer
) -> None:
    with new_mesh(server, tmp_path, nats_url=production["mesh"], environment="main") as mesh:
        module = mesh.deploy(NESTED)
        mesh.start_worker()
        call = module.inner.spawn(1)
        assert call.get() == 2

        async def look() -> None:
            broker = await Broker.open(Settings.load({"nats_url": production["viewer"]}, start=tmp_path))
            try:
                assert (await broker.results.get(f"{call.object_id}.0")) is not None
                assert "production" in await broker.registry.heads()
                with pytest.raises(PermissionDeniedError, match="does not allow it: permissions violation for publish"):
                    await broker.connection.store("mesh.call.production.inner._.x.0", b"", timeout=1)
                address = Address("production", "inner", "_", new_call_id(broker.token))
                many = [Input(address=dataclasses.replace(address, index=index), body=b"{}") for index in range(100)]
                with pytest.raises(PermissionDeniedError, match="permissions violation for publish"):
                    await broker.calls.submit_many(many)
                with pytest.raises(PermissionDeniedError):
                    await broker.connection.api("CONSUMER.DELETE.MESH_CALLS.production+inner+_", timeout=1)
            finally:
                await broker.close()
            client = await nats.connect(production["viewer"])  # what `nats kv ls` does
            keys = await (await client.jetstream().key_value("mesh_functions")).keys()
            assert "production.inner" in keys
            await client.close()

        asyncio.run(look())
