"""nats-py's client with our own way in and out: the same messages as by its own, however the bytes come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import nats.errors
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

from mesh.broker.lines import Incoming, Line, decode_headers, encode_headers
from mesh.server import NatsServer

names = st.text("abcXYZ-019", min_size=1, max_size=12)
values = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp", "Zs"]), max_size=20)


def message(subject: str, reply: str = "", block: bytes = b"", data: bytes = b"", sid: int = 1) -> bytes:
    """What a server sends."""
    words = [subject, str(sid), *([reply] if reply else [])]
    if block:
        line = " ".join(["HMSG", *words, str(len(block)), str(len(block) + len(data))])
    else:
        line = " ".join(["MSG", *words, str(len(data))])
    return line.encode() + b"\r\n" + block + data + b"\r\n"


def framed(headers: dict[str, str]) -> bytes:
    """Headers with the lines before and after them."""
    return b"NATS/1.0\r\n" + encode_headers(headers) + b"\r\n"


async def cut(*pieces: bytes) -> list[tuple[str, str, dict[str, str], bytes]]:
    """The messages in what is read piece by piece."""
    line, taken = Line(), list[Incoming]()
    line.takers[b"1"] = taken.append
    for piece in pieces:
        await line._ps.parse(piece)
    return [(m.subject, m.reply, m.headers, m.data) for m in taken]


STREAM = b"".join(
    [
        message("a.b"),
        b"+OK\r\n",
        message("a.c", "reply.to.me", data=b"MSG a 1 3\r\n"),
        message("a.d", block=framed({"One": "1", "Two": "zwei"}), data=b"\r\n\r\nMSG"),
        message("a.e", "$JS.ACK.x", block=b"NATS/1.0 404 No Messages\r\n\r\n"),
        message("a.f", sid=9, data=b"of nobody"),
        message("a.g", data=bytes(range(256))),
    ]
)
CUT = [
    ("a.b", "", {}, b""),
    ("a.c", "reply.to.me", {}, b"MSG a 1 3\r\n"),
    ("a.d", "", {"One": "1", "Two": "zwei"}, b"\r\n\r\nMSG"),
    ("a.e", "$JS.ACK.x", {"Status": "404", "Description": "No Messages"}, b""),
    ("a.g", "", {}, bytes(range(256))),
]


async def test_messages_are_cut_wherever_the_bytes_are() -> None:
    assert await cut(STREAM) == CUT
    for at in range(len(STREAM)):
        assert await cut(STREAM[:at], STREAM[at:]) == CUT, at
    assert await cut(*(bytes([byte]) for byte in STREAM)) == CUT


async def test_what_is_no_line_ends_the_connection_instead_of_filling_memory() -> None:
    for nonsense in (b"HELLO you\r\n", b"x" * (1 << 20) + b"x"):
        with pytest.raises(nats.errors.ProtocolError):
            await cut(nonsense)


@given(st.dictionaries(names, values, max_size=5))
def test_headers_come_back_as_they_went_and_as_nats_py_reads_them(headers: dict[str, str]) -> None:
    block = framed(headers)
    assert decode_headers(block) == headers
    assert asyncio.run(Client()._process_headers(block)) == (headers or None)


@pytest.mark.parametrize(
    "block",
    [
        b"NATS/1.0 503\r\n\r\n",
        b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 7\r\n\r\n",
        b"NATS/1.0 409 Incoming Size Exceeds MaxBytes\r\nNats-Pending-Messages: 3\r\n\r\n",
        b"NATS/1.0\r\nNo-Space:a\r\nTab:\tb \r\nno colon\r\nspace in: name\r\nEmpty:\r\nBroken: \xff\r\n\r\n",
        b"NATS/1.0\r\nTwice: 1\r\nTwice: 2\r\n\r\n",
    ],
)
async def test_other_peoples_headers_are_read_as_by_nats_py(block: bytes) -> None:
    assert decode_headers(block) == await Client()._process_headers(block)


def test_nothing_in_a_header_makes_another_one() -> None:
    block = framed({"Mesh-Preview": "a\r\nNats-TTL: 1s", "Broken\nName": "b"})
    assert decode_headers(block) == {"Mesh-Preview": "a  Nats-TTL: 1s"}
    assert block.count(b"\r\n") == 4


# --- with a server ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def line(server: NatsServer) -> AsyncIterator[Line]:
    opened = Line()
    await opened.connect(server.url)
    yield opened
    await opened.close()


async def test_a_taker_has_each_message_in_order_and_one_that_raises_keeps_nothing_from_the_others(line: Line) -> None:
    taken, errors = list[bytes](), list[Exception]()

    def take(message: Incoming) -> None:
        taken.append(message.data)
        if message.data == b"1":
            raise ValueError("of this one")

    async def report(error: Exception) -> None:
        errors.append(error)

    line._error_cb = report
    inbox = line.new_inbox()
    subscription = await line.listen(inbox, take)
    for number in range(1000):
        line.send(inbox, b"%d" % number, b"Number: %d\r\n" % number if number % 2 else b"")
    large = bytes(900_000)
    line.send(inbox, large)
    await line.flush()
    assert taken == [*(b"%d" % number for number in range(1000)), large]
    assert [str(error) for error in errors] == ["of this one"]
    await subscription.unsubscribe()
    line.send(inbox, b"late")
    await line.flush()
    assert len(taken) == 1001
    assert not line.takers


@pytest.fixture
def writes(line: Line, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What goes to the socket, write by write."""
    assert line._transport is not None
    written, write = list[bytes](), line._transport.write

    def note(data: bytes) -> None:
        written.append(data)
        write(data)

    monkeypatch.setattr(line._transport, "write", note)
    return written


async def test_all_that_is_sent_in_one_turn_is_one_write(line: Line, writes: list[bytes]) -> None:
    for number in range(100):
        line.send("nobody", b"%d" % number)
    await asyncio.sleep(0)
    assert len(writes) == 1
    assert writes[0].count(b"PUB nobody") == 100


async def test_what_nobody_waits_for_goes_with_the_next_message_or_soon_after(line: Line, writes: list[bytes]) -> None:
    line.send("first", in_no_hurry=True)
    await asyncio.sleep(0)
    assert not writes
    line.send("second")
    await asyncio.sleep(0)
    assert [data.count(b"PUB") for data in writes] == [2]
    line.send("third", in_no_hurry=True)
    async with asyncio.timeout(10):
        while len(writes) < 2:
            await asyncio.sleep(0.001)
    line.send("fourth", in_no_hurry=True)
    await line.flush()  # a flush is a flush
    assert [data.split()[1] for data in writes if data.startswith(b"PUB")] == [b"first", b"third", b"fourth"]


async def test_what_is_sent_as_the_connection_breaks_arrives_afterwards(server: NatsServer) -> None:
    line = Line()
    await line.connect(server.url, reconnect_time_wait=0.05)
    taken: list[Incoming] = []
    await line.listen("somewhere", taken.append)
    await line.flush()
    assert line._transport is not None
    line._transport._io_writer.transport.abort()  # type: ignore[attr-defined]
    line.send("somewhere", b"late")  # before nats-py has noticed
    async with asyncio.timeout(20):
        while not taken:
            await asyncio.sleep(0.02)
    assert [message.data for message in taken] == [b"late"]
    await line.close()


async def test_what_is_too_large_or_too_late_is_refused(line: Line) -> None:
    with pytest.raises(nats.errors.MaxPayloadError):
        line.send("nobody", bytes(line.max_payload + 1))
    await line.close()
    with pytest.raises(nats.errors.ConnectionClosedError):
        line.send("nobody", b"")


async def test_what_is_sent_while_the_server_is_away_arrives_and_takers_go_on(
    own_server: Callable[..., NatsServer], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    server = own_server(store=store)
    line, taken, back, away = Line(), list[bytes](), asyncio.Event(), asyncio.Event()

    async def on_back() -> None:
        back.set()

    async def on_away() -> None:
        away.set()

    callbacks = {"reconnected_cb": on_back, "disconnected_cb": on_away}
    await line.connect(server.url, reconnect_time_wait=0.05, max_reconnect_attempts=-1, **callbacks)  # type: ignore[arg-type]
    await line.listen("to.me", lambda message: taken.append(message.data))
    line.send("to.me", b"before")
    await line.flush()
    server.kill()
    await asyncio.wait_for(away.wait(), 10)
    line.send("to.me", b"meanwhile")
    own_server(store=store, port=server.port)
    await asyncio.wait_for(back.wait(), 20)
    line.send("to.me", b"after")
    await line.flush()
    assert taken == [b"before", b"meanwhile", b"after"]
    await line.close()
