"""The chunk protocol, without any wire: numbering, credit, gaps, and items across chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.exception import InternalFailure, InvalidError
from mesh.flow import (
    MAX_CHUNK,
    MAX_ITEMS,
    WINDOW,
    Alive,
    Chunk,
    End,
    Inflow,
    Items,
    Message,
    Outflow,
    decode,
    encode,
    pack_item,
)
from mesh.protocol import Format


def drained(flow: Outflow, *, whole: bool = False) -> list[bytes]:
    """Everything that may go, with credit for all of it."""
    flow.grant(1 << 30)
    return list(iter(lambda: flow.take(whole=whole), None))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_small_items_share_a_chunk() -> None:
    flow = Outflow()
    for data in (b"a", b"b", b"c"):
        flow.write(data)
    assert not flow.is_full
    assert flow.take(whole=True) is None, "it may become larger yet"
    assert flow.take(whole=False) == b"abc"
    assert flow.is_empty


def test_a_chunk_has_a_bounded_number_of_items() -> None:
    flow = Outflow()
    for _ in range(2 * MAX_ITEMS + 1):
        flow.write(b"x")
    assert [len(chunk) for chunk in drained(flow)] == [MAX_ITEMS, MAX_ITEMS, 1]


def test_a_large_item_is_cut() -> None:
    flow = Outflow()
    flow.write(b"head")
    flow.write(b"x" * (3 * MAX_CHUNK))
    chunks = drained(flow)
    assert [len(chunk) for chunk in chunks] == [MAX_CHUNK, MAX_CHUNK, MAX_CHUNK, 4]
    assert b"".join(chunks) == b"head" + b"x" * (3 * MAX_CHUNK)


def test_nothing_goes_without_credit() -> None:
    flow = Outflow()
    for _ in range(WINDOW):
        flow.write(b"x")
        assert flow.take(whole=False) == b"x"
    flow.write(b"y")
    assert flow.take(whole=False) is None
    flow.grant(WINDOW + 1)
    assert flow.take(whole=False) == b"y"


def test_an_older_grant_takes_nothing_back() -> None:
    flow = Outflow()
    flow.grant(WINDOW + 2)
    flow.grant(WINDOW + 1)
    for _ in range(WINDOW + 2):
        flow.write(b"x")
        assert flow.take(whole=False) == b"x"


def test_a_writer_far_ahead_is_full() -> None:
    flow, written = Outflow(), 0
    while not flow.is_full:
        flow.write(b"x")
        written += 1
        flow.take(whole=True)
    assert written == WINDOW * MAX_ITEMS + MAX_ITEMS


# --- reading ---------------------------------------------------------------------------------------------------------


def test_chunks_come_out_in_order() -> None:
    flow = Inflow()
    for message in (Alive(0), Chunk(1, b"a"), Chunk(2, b"b"), Alive(2), End(2)):
        flow.receive(message)
    assert flow.ended
    assert [flow.pop(), flow.pop(), flow.pop()] == [b"a", b"b", None]


@pytest.mark.parametrize(
    "messages",
    [
        [Chunk(2, b"b")],
        [Chunk(1, b"a"), Chunk(3, b"c")],
        [Chunk(1, b"a"), Alive(2)],
        [Chunk(1, b"a"), End(2)],
        [End(1)],
        [Chunk(1, b"a"), End(1), Chunk(2, b"b")],
        [Chunk(1, b"a"), Chunk(1, b"a")],
    ],
)
def test_what_is_missing_is_noticed(messages: list[Message]) -> None:
    flow = Inflow()
    *before, last = messages
    for message in before:
        flow.receive(message)
    with pytest.raises(InternalFailure, match="lost"):
        flow.receive(last)


def test_only_reading_gives_credit() -> None:
    flow = Inflow()
    for number in range(1, WINDOW + 1):
        flow.receive(Chunk(number, b"x"))
        assert flow.grant_due() is None
        assert flow.grant == WINDOW
    grants = []
    while flow.pop() is not None:
        grants.append(flow.grant_due())
    assert [grant for grant in grants if grant] == [WINDOW + WINDOW // 2, 2 * WINDOW]


def test_what_has_ended_needs_no_credit() -> None:
    flow = Inflow()
    for number in range(1, WINDOW + 1):
        flow.receive(Chunk(number, b"x"))
    flow.receive(End(WINDOW))
    while flow.pop() is not None:
        assert flow.grant_due() is None


@pytest.mark.parametrize("message", [Chunk(7, b"\x00abc"), Alive(0), End(12)])
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert decode(*encode(message)) == message


def test_a_message_on_the_wire() -> None:
    assert encode(Chunk(7, b"x")) == ({"Mesh-Chunk": "7"}, b"x")
    assert encode(Alive(3)) == ({"Mesh-Sent": "3"}, b"")
    assert encode(End(3)) == ({"Mesh-End": "3"}, b"")


@pytest.mark.parametrize("headers", [{}, {"Mesh-Chunk": "x"}, {"Mesh-Chunk": "-1"}, {"Mesh-End": ""}])
def test_anything_else_is_no_message(headers: dict[str, str]) -> None:
    with pytest.raises(InvalidError):
        decode(headers, b"")


# --- items -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from(Format), st.binary(max_size=300)), max_size=100),
    st.lists(st.integers(1, 500), min_size=1),
)
def test_items_come_out_whole_wherever_the_flow_was_cut(sent: list[tuple[Format, bytes]], cuts: list[int]) -> None:
    data = b"".join(pack_item(*item) for item in sent)
    items, found, at, turn = Items(), [], 0, 0
    while at < len(data):
        found += items.feed(data[at : at + cuts[turn % len(cuts)]])
        at, turn = at + cuts[turn % len(cuts)], turn + 1
        assert items.whole or at < len(data)
    assert found == sent
    assert items.whole


@pytest.mark.parametrize("chunk", [b"abc", b"\x92\x09\xc4\x00", b"\x91\x00", b"\xc1", b"\x92\xa1x\xc4\x00"])
def test_what_is_no_item_is_said(chunk: bytes) -> None:
    with pytest.raises(InternalFailure, match="what came is no item"):
        list(Items().feed(chunk))


@given(st.lists(st.binary(max_size=100), max_size=300), st.data())
def test_everything_written_arrives_once_whatever_the_credit(items: list[bytes], data: st.DataObject) -> None:
    """A writer and a reader with a wire between them that loses grants, but nothing else."""
    out, into, reading = Outflow(), Inflow(), Items()
    found: list[bytes] = []
    todo = [pack_item(Format.MSGPACK, item) for item in reversed(items)]
    sent = 0
    while len(found) < len(items):
        if todo and not out.is_full and data.draw(st.booleans()):
            out.write(todo.pop())
        while (chunk := out.take(whole=bool(todo) and data.draw(st.booleans()))) is not None:
            sent += 1
            into.receive(Chunk(sent, chunk))
            assert sent - into.count + len(list(into._unread)) <= WINDOW
        if (chunk := into.pop()) is not None:
            found += [body for _, body in reading.feed(chunk)]
        elif out.is_empty and not todo:
            break
        if (number := into.grant_due()) is None or data.draw(st.booleans()):
            number = into.grant  # said again
        out.grant(number)
    into.receive(End(sent))
    assert found == items
