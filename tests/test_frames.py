"""The conversation between a worker and a container: every frame, literally, and what is none."""

from __future__ import annotations

import os
import struct
import time
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import frames
from mesh.frames import (
    HEADER_SIZE,
    MAX_FRAME,
    BeginMarks,
    BrokenFrameError,
    Buffer,
    Cancel,
    Chunk,
    Credit,
    Drop,
    Dropped,
    Ended,
    Feed,
    Fork,
    Forked,
    Frame,
    Gone,
    Home,
    LiveUntil,
    Log,
    NotForked,
    Outcome,
    Ready,
    Start,
    StartFailed,
    Stop,
    Waiting,
    Work,
)

ABOUT = ("shop", "resize", "v1", "main", "w1", "w1/1", {"module": "shop", "name": "resize"}, {"a": 1}, "/code/ab")
START = Start(*ABOUT, 1 << 20, 4, False, "ab12", "/tmp/ta", 1 << 30, "as set")
WORK = Work(7, "fc-01JXYZ0123ABCDEFGHT0KEN123", 0, 2, "ValueError: no", "json", b"{}", True, "ask", False, 3, "/tmp/p")

GOLDEN: list[tuple[Frame, list[Any]]] = [
    (
        START,
        [
            0,
            "shop",
            "resize",
            "v1",
            "main",
            "w1",
            "w1/1",
            {"module": "shop", "name": "resize"},
            {"a": 1},
            "/code/ab",
            1 << 20,
            4,
            False,
            "ab12",
            "/tmp/ta",
            1 << 30,
            "as set",
        ],
    ),
    (
        WORK,
        [1, 7, "fc-01JXYZ0123ABCDEFGHT0KEN123", 0, 2, "ValueError: no", "json", b"{}", True, "ask", False, 3, "/tmp/p"],
    ),
    (Stop(), [2]),
    (Ready(), [3, ""]),
    (StartFailed(b"\x80", for_good=True), [4, b"\x80", True]),
    (Outcome(7, "succeeded", "json", b"", large=True), [5, 7, "succeeded", "json", b"", True]),
    (Log(7, 2, "line\n"), [6, 7, 2, "line\n"]),
    (Waiting(4, True), [7, 4, True]),
    (Cancel(7, False), [8, 7, False]),
    (Drop(7), [9, 7]),
    (Dropped(7, True), [10, 7, True]),
    (Chunk(7, b"\x92"), [11, 7, b"\x92"]),
    (Credit(7, 24), [12, 7, 24]),
    (Home("mesh container", "/tmp/ta", {"A": "b"}), [13, "mesh container", "/tmp/ta", {"A": "b"}]),
    (Fork(3, 12.5), [14, 3, 12.5]),
    (LiveUntil(3, 12.5), [15, 3, 12.5]),
    (Forked(3, 77), [16, 3, 77]),
    (NotForked(3, "EAGAIN"), [17, 3, "EAGAIN"]),
    (Ended(3, 256, 1 << 20, False), [18, 3, 256, 1 << 20, False]),
    (Feed(7, b"body"), [19, 7, b"body"]),
    (Gone(7), [20, 7]),
]
IDS = [type(frame).__name__ for frame, _ in GOLDEN]


@pytest.mark.parametrize(("frame", "values"), GOLDEN, ids=IDS)
def test_a_frame_is_its_length_its_number_and_its_values_in_order(frame: Frame, values: list[Any]) -> None:
    data = frames.encode(frame)
    assert data[:HEADER_SIZE] == struct.pack(">I", len(data) - 4)
    assert msgpack.unpackb(data[HEADER_SIZE:]) == values


@pytest.mark.parametrize(("frame", "values"), GOLDEN, ids=IDS)
def test_a_frame_comes_back_as_it_was(frame: Frame, values: list[Any]) -> None:
    assert frames.decode(msgpack.packb(values)) == frame
    assert frames.decode(frames.encode(frame)[HEADER_SIZE:]) == frame


def test_one_frame_byte_for_byte() -> None:
    assert frames.encode(Log(7, 2, "ok\n")) == b"\x00\x00\x00\x08" + b"\x94\x06\x07\x02\xa3ok\n"


def test_every_kind_of_frame_is_pinned_above() -> None:
    assert [type(frame) for frame, _ in GOLDEN] == list(Frame.__args__)


@given(st.text(st.characters(exclude_categories=())))
def test_a_line_survives_whatever_a_program_prints(text: str) -> None:
    assert frames.decode(frames.encode(Log(1, 1, text))[HEADER_SIZE:]) == Log(1, 1, text)


@given(st.binary())
def test_what_a_function_returned_is_not_looked_into(body: bytes) -> None:
    assert frames.decode(frames.encode(Outcome(1, "succeeded", "pickle", body))[HEADER_SIZE:]).body == body  # type: ignore[union-attr]


# --- what is no frame ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"hello",
        msgpack.packb(7),
        msgpack.packb([]),
        msgpack.packb([11, 1]),
        msgpack.packb([-1, 7, True]),
        msgpack.packb(["6", 7, 2, "x"]),
        msgpack.packb([6, 7, 2]),
        msgpack.packb([2, "more"]),
        msgpack.packb([2]) + b"\x00",
    ],
)
def test_what_is_no_frame_is_refused(body: bytes) -> None:
    with pytest.raises(BrokenFrameError, match="not a frame"):
        frames.decode(body)


@given(st.binary())
def test_whatever_a_program_writes_to_the_socket_is_a_frame_or_refused(body: bytes) -> None:
    try:
        frame = frames.decode(body)
    except BrokenFrameError:
        return
    assert type(frame) in Frame.__args__


def test_a_length_that_no_frame_has_is_refused_before_it_is_waited_for() -> None:
    assert frames.body_length(struct.pack(">I", MAX_FRAME)) == MAX_FRAME
    with pytest.raises(BrokenFrameError, match=f"a frame of {MAX_FRAME + 1} bytes was announced; the limit is"):
        frames.body_length(struct.pack(">I", MAX_FRAME + 1))
    with pytest.raises(BrokenFrameError, match="was announced"):
        list(Buffer().feed(b"GET / HTTP/1.1\r\n"))


def test_a_frame_of_nothing_is_refused_as_soon_as_it_is_announced() -> None:
    with pytest.raises(BrokenFrameError, match="not a frame"):
        list(Buffer().feed(b"\x00" * HEADER_SIZE))


# --- cutting a stream into frames ------------------------------------------------------------------------------------

FRAMES = [frame for frame, _ in GOLDEN]
STREAM = b"".join(frames.encode(frame) for frame in FRAMES)


@given(st.lists(st.integers(0, len(STREAM)), max_size=20).map(sorted))
def test_a_stream_gives_the_same_frames_however_it_is_cut(cuts: list[int]) -> None:
    buffer = Buffer()
    pieces = [STREAM[start:end] for start, end in zip([0, *cuts], [*cuts, len(STREAM)], strict=True)]
    assert [frame for piece in pieces for frame in buffer.feed(piece)] == FRAMES


def test_a_stream_may_come_byte_by_byte() -> None:
    buffer = Buffer()
    assert [frame for byte in STREAM for frame in buffer.feed(bytes([byte]))] == FRAMES


def test_a_frame_is_given_as_soon_as_it_is_complete_and_not_before() -> None:
    buffer, data = Buffer(), frames.encode(WORK)
    assert list(buffer.feed(data[:-1])) == []
    assert list(buffer.feed(data[-1:] + frames.encode(Stop())[:3])) == [WORK]
    assert list(buffer.feed(frames.encode(Stop())[3:])) == [Stop()]


def test_frames_before_a_broken_one_still_count() -> None:
    complete = Buffer().feed(frames.encode(WORK) + b"\x00\x00\x00\x01\xc1")
    assert next(complete) == WORK
    with pytest.raises(BrokenFrameError):
        next(complete)


# --- the page that both sides see ------------------------------------------------------------------------------------


def test_the_worker_sees_when_the_container_began_each_of_its_inputs() -> None:
    descriptor = BeginMarks.memfd(2)
    container, worker = BeginMarks(descriptor), BeginMarks(descriptor)
    os.close(descriptor)
    assert worker.began(1) is None
    before = time.monotonic()
    place = container.note(7)
    container.note(6)
    seven, six = worker.began(7), worker.began(6)
    assert seven is not None
    assert six is not None
    assert before <= seven <= six <= time.monotonic()
    container.end(place)
    container.note(9)
    assert worker.began(7) is None, "its place is another one's"
    assert worker.began(6) == six
    assert worker.began(8) is None
    for marks in (container, worker):
        marks.close()
