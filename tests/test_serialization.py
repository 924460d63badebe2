"""User data to bytes and back: as what it was, or not at all, with the reason."""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import enum
import importlib.machinery
import json
import math
import subprocess
import sys
import textwrap
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import exception, serialization
from mesh.exception import DeserializationError, ExecutionError, FunctionTimeoutError, InvalidError, SerializationError
from mesh.protocol import Failure, Format, failure
from mesh.serialization import (
    decode,
    decode_arguments,
    dumps,
    encode,
    encode_arguments,
    loads,
    main_name,
    pack_exception,
    preview,
    safe_str,
    unpack_exception,
)

# --- values: hypothesis ----------------------------------------------------------------------------------------------


class Name(str): ...


class Items(list[Any]): ...


class Colour(enum.IntEnum):
    RED = 1


ANY_TEXT = st.text(st.characters(exclude_categories=()))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY_TEXT | st.binary()
ODD = st.sampled_from(
    [Name("n"), Colour.RED, decimal.Decimal("1.5"), dt.date(2020, 1, 1), 1j, b"".join, bytearray(b"x")]
)
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers())


def nested(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(children)
        | st.dictionaries(KEYS, children)
        | st.tuples(children, children)
        | st.lists(children).map(Items)
        | st.dictionaries(st.text(), children).map(collections.OrderedDict)
    )


def same(one: Any, other: Any) -> bool:
    """Equal, and of exactly the same types all the way down: `1 == True == 1.0` is not enough."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(k, j) and same(v, w) for (k, v), (j, w) in zip(one.items(), other.items(), strict=True)
        )
    return repr(one) == repr(other)


@given(st.recursive(PLAIN | ODD, nested, max_leaves=20))
def test_a_value_comes_back_as_what_it_was(value: Any) -> None:
    assert same(decode(*encode(value)), value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@given(JSON_VALUES)
def test_what_json_holds_exactly_travels_as_json(value: Any) -> None:
    format, body = encode(value)
    assert format is Format.JSON
    assert same(json.loads(body), value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
        lambda children: st.lists(children) | st.dictionaries(st.text() | st.integers(0, 1000), children),
        max_leaves=20,
    )
)
def test_what_msgpack_holds_exactly_is_never_pickled(value: Any) -> None:
    format, body = encode(value)
    assert format in (Format.JSON, Format.MSGPACK)
    if format is Format.MSGPACK:
        assert same(msgpack.unpackb(body, strict_map_key=False), value)


# --- values: the formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "format", "body"),
    [
        (None, Format.JSON, b"null"),
        ({"a": [1, 2.5, True, "grün"]}, Format.JSON, '{"a":[1,2.5,true,"grün"]}'.encode()),
        (b"x", Format.MSGPACK, b"\xc4\x01x"),
        ({1: "a"}, Format.MSGPACK, b"\x81\x01\xa1a"),
    ],
)
def test_a_plain_value_is_these_bytes(value: object, format: Format, body: bytes) -> None:
    assert encode(value) == (format, body)


def nest(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        [(1,)],
        {(1,): 2},
        {1, 2},
        {True: 1},
        {None: 1},
        {1.5: 1},
        {b"k": 1},
        Name("n"),
        Items([1]),
        Colour.RED,
        {"c": Colour.RED},
        collections.OrderedDict(a=1),
        collections.defaultdict(list),
        math.inf,
        [math.nan],
        "\ud800",
        {"\ud800": 1},
        [b"", "\udfff"],
        10**5000,
        {1: 2**64},
        nest(65),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_come_back_as_something_else_is_pickled(value: object) -> None:
    format, body = encode(value)
    assert format is Format.PICKLE
    assert type(decode(format, body)) is type(value)


def test_nesting_that_everybody_can_read_is_json_still() -> None:
    value: Any = 1
    for levels in range(1, 70):
        value = {"deeper": value}
        assert (encode(value)[0] is Format.JSON) == (levels <= 65)
    assert encode(nest(64))[0] is Format.JSON


def test_a_list_that_holds_itself_comes_back_so() -> None:
    value: list[Any] = []
    value.append(value)
    back = decode(*encode(value))
    assert back[0] is back


def test_functions_and_classes_made_on_the_spot_travel_by_value() -> None:
    class Counter:
        start = 5

    step = 2
    counter, add = decode(*encode([Counter, lambda n: n + step]))
    assert (counter.start, add(1)) == (5, 3)


@pytest.mark.parametrize(
    ("format", "body", "text"),
    [
        (Format.JSON, b"{", "cannot be read as json: JSONDecodeError"),
        (Format.JSON, b"\xff", "cannot be read as json: UnicodeDecodeError"),
        (Format.MSGPACK, b"", "cannot be read as msgpack: "),
        (Format.MSGPACK, b"\x01\x02", "cannot be read as msgpack: ExtraData"),
        (Format.PICKLE, b"", "cannot be read as pickle: EOFError"),
        (Format.PICKLE, b"junk", "cannot be read as pickle: "),
        (Format.PICKLE, b"cjson\nnothing\n.", "cannot be read as pickle: AttributeError"),
        (
            Format.PICKLE,
            b"cnowhere.deep\nThing\n.",
            "it is made of nowhere.deep.Thing; module 'nowhere' cannot be imported here",
        ),
    ],
)
def test_bytes_that_cannot_be_read_are_an_error_of_ours_with_the_reason(format: Format, body: bytes, text: str) -> None:
    with pytest.raises(DeserializationError) as caught:
        decode(format, body)
    assert text in str(caught.value)


@given(st.sampled_from(Format), st.binary(max_size=50))
def test_whatever_bytes_a_hand_made_call_has_they_are_read_or_refused(format: Format, body: bytes) -> None:
    try:
        decode(format, b"(" + body if format is Format.PICKLE else body)
    except DeserializationError:
        pass


# --- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_are_one_body_a_person_can_write() -> None:
    assert encode_arguments((1, "a"), {"k": None}) == (Format.JSON, b'{"args":[1,"a"],"kwargs":{"k":null}}')


@given(st.lists(PLAIN).map(tuple), st.dictionaries(st.text(), PLAIN))
def test_arguments_come_back_as_what_they_were(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    got_args, got_kwargs = decode_arguments(*encode_arguments(args, kwargs))
    assert same(tuple(got_args), args)
    assert same(got_kwargs, kwargs)


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        (b"", ([], {})),
        (b"{}", ([], {})),
        (b'{"args":[1]}', ([1], {})),
        (b'{"kwargs":{"a":1}}', ([], {"a": 1})),
        (b' { "args" : [ ] , "more": 1 } ', ([], {})),
    ],
)
def test_what_a_person_leaves_out_is_empty(body: bytes, arguments: object) -> None:
    assert decode_arguments(Format.JSON, body) == arguments


@pytest.mark.parametrize(
    "value", [[1, 2], 5, None, {"args": 1}, {"args": {}}, {"kwargs": []}, {"args": [], "kwargs": None}]
)
def test_arguments_of_another_shape_are_refused_with_the_right_one(value: object) -> None:
    with pytest.raises(DeserializationError) as caught:
        decode_arguments(Format.JSON, json.dumps(value).encode())
    assert str(caught.value) == f'arguments must be {{"args": […], "kwargs": {{…}}}}, not {value!r}'


def test_keywords_that_are_no_text_are_refused() -> None:
    with pytest.raises(DeserializationError, match="arguments must be"):
        decode_arguments(Format.MSGPACK, msgpack.packb({"kwargs": {1: 2}}))


def test_a_preview_is_made_of_long_arguments_in_json_only() -> None:
    assert preview(Format.JSON, b"x" * 120) == ""  # the message itself shows it
    assert preview(Format.JSON, b"x" * 121) == "x" * 121
    assert preview(Format.JSON, b"x" * 10_000) == "x" * 480
    assert preview(Format.JSON, b"x" * 400 + b"\xff") == "x" * 400 + "�"
    assert preview(Format.MSGPACK, msgpack.packb("x" * 400)) == ""
    assert preview(Format.PICKLE, dumps("x" * 400)) == ""


# --- what cannot be pickled, and where it hides ----------------------------------------------------------------------

LOCK = threading.Lock()


class Holder:
    def __init__(self, **parts: object) -> None:
        self.__dict__.update(parts)


class BadRepr:
    def __repr__(self) -> str:
        raise RuntimeError

    def __reduce__(self) -> Any:
        raise TypeError("not me")


class LongRepr(BadRepr):
    def __repr__(self) -> str:
        return "x" * 101


def closure_over(lock: object) -> Callable[[], object]:
    return lambda: lock


def closure_over_nothing_yet() -> Callable[[], object]:
    def function() -> object:
        return later, lock

    lock = LOCK
    if lock is None:
        later = 1  # so `later` is a variable of the closure, which has no value when the closure is sent
    return function


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (LOCK, "<unlocked _thread.lock object at "),
        ([1, LOCK], "at [1]: <unlocked _thread.lock"),
        ({"a": [0, {"b": LOCK}]}, "at ['a'][1]['b']: <unlocked _thread.lock"),
        ({"h": Holder(inner=Holder(lock=LOCK))}, "at ['h'].inner.lock: <unlocked _thread.lock"),
        ((x for x in "ab"), "<generator object"),
        (closure_over(LOCK), "at its variable 'lock': <unlocked _thread.lock"),
        (closure_over_nothing_yet(), "at its variable 'lock': <unlocked _thread.lock"),
        (LongRepr(), "x" * 99 + "… cannot be pickled: not me"),
        (BadRepr(), "<BadRepr, whose repr raises RuntimeError> cannot be pickled: not me"),
    ],
)
def test_what_cannot_be_pickled_is_named_with_the_way_to_it(value: object, text: str) -> None:
    with pytest.raises(SerializationError) as caught:
        encode(value)
    assert str(caught.value).startswith(text)
    assert "cannot be pickled: " in str(caught.value)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_global_that_stops_a_function_is_named() -> None:
    scope: dict[str, Any] = {"__name__": "__main__", "lock": LOCK}
    exec("def function():\n    return lock", scope)
    with pytest.raises(SerializationError, match=r"^at its global 'lock': <unlocked _thread.lock"):
        dumps(scope["function"])


def test_the_argument_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(SerializationError, match=r"^cannot send argument 2: at \[0\]: <unlocked"):
        encode_arguments((1, [LOCK]), {})
    with pytest.raises(SerializationError, match=r"^cannot send config: <unlocked"):
        encode_arguments((1,), {"plain": 1, "config": LOCK})


# --- exceptions ------------------------------------------------------------------------------------------------------


class Coded(Exception):
    """What most codebases have: an `__init__` that takes other things than it passes on."""

    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(f"error {code}")
        self.code = code
        self.hint = hint


class OwnReduce(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} {b}")
        self.a, self.b = a, b

    def __reduce__(self) -> Any:
        return OwnReduce, (self.a, self.b)


class OwnReduceEx(Exception):
    def __init__(self, *, a: int) -> None:
        self.a = a

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _own_reduce_ex, (self.a,)


def _own_reduce_ex(a: int) -> OwnReduceEx:
    return OwnReduceEx(a=a)


class OwnOSError(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "gone", path)
        self.path = path


class Unpicklable(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class BadStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError


class BadStrAndRepr(BadStr):
    def __repr__(self) -> str:
        raise KeyError


def raised(error: BaseException) -> BaseException:
    """The error as it is once it was raised: with a traceback."""
    try:
        raise error
    except BaseException as caught:
        return caught


def travel(error: BaseException) -> Exception:
    """The error as the caller gets it."""
    packed = pack_exception(raised(error), lambda file: False)
    return unpack_exception(Failure.decode(packed.encode()))


def parts(error: BaseException) -> tuple[Any, ...]:
    own = {name: value for name, value in vars(error).items() if name != "__notes__"}
    return type(error), error.args, str(error), own


def decode_error() -> UnicodeDecodeError:
    with pytest.raises(UnicodeDecodeError) as caught:
        b"\xff".decode()
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyError("k"),
        Exception(),
        Exception(1, [2], {"three": 3}),
        StopIteration(5),
        decode_error(),
        SyntaxError("bad", ("f.py", 1, 2, "x =")),
        Coded(5, hint="try again"),
        OwnReduce(1, 2),
        OwnReduceEx(a=1),
        InvalidError("a user may raise ours"),
        exception.ImageBuildError("no", "im-1"),
        FunctionTimeoutError("and this one"),
        TimeoutError("the builtin"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_arrives_as_its_own_type_with_its_parts(error: Exception) -> None:
    assert parts(travel(error)) == parts(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError("just text"),
        OSError(2, "gone"),
        FileNotFoundError(2, "gone", "/a"),
        PermissionError(13, "no", "/a", None, "/b"),
        ConnectionResetError(104, "reset"),
        BlockingIOError(11, "later", 5),
        OwnOSError("/a"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_os_error_arrives_with_number_text_and_files(error: OSError) -> None:
    back = travel(error)
    assert isinstance(back, OSError)
    assert parts(back) == parts(error)
    for name in ("errno", "strerror", "filename", "filename2"):
        assert getattr(back, name) == getattr(error, name)


def test_a_failed_import_arrives_with_the_name_of_the_module() -> None:
    back = travel(ModuleNotFoundError("No module named 'x'", name="x", path="/x"))
    assert isinstance(back, ModuleNotFoundError)
    assert (back.name, back.path) == ("x", "/x")


@pytest.mark.parametrize("code", ["nothing_of_this_name", "().nothing_of_this_name"])
def test_a_misspelt_name_arrives_with_it(code: str) -> None:
    with pytest.raises((NameError, AttributeError)) as caught:
        eval(code)
    assert getattr(travel(caught.value), "name", None) == "nothing_of_this_name"


def test_a_group_arrives_with_all_it_holds() -> None:
    group = ExceptionGroup("two", [Coded(1, hint="a"), ExceptionGroup("inner", [OSError(2, "gone", "/a")])])
    back = travel(group)
    assert isinstance(back, ExceptionGroup)
    assert (back.message, parts(back.exceptions[0])) == ("two", parts(group.exceptions[0]))
    inner = back.exceptions[1]
    assert isinstance(inner, ExceptionGroup)
    assert parts(inner.exceptions[0])[:3] == (FileNotFoundError, (2, "gone"), "[Errno 2] gone: '/a'")


def test_cause_and_context_arrive_with_it() -> None:
    outer, cause, context = ValueError("outer"), Coded(1, hint="a"), KeyError("context")
    outer.__cause__, cause.__context__ = cause, context
    back = travel(outer)
    assert back.__cause__ is not None
    assert parts(back.__cause__) == parts(cause)
    assert back.__suppress_context__
    assert back.__cause__.__context__ is not None
    assert parts(back.__cause__.__context__) == parts(context)


def test_a_context_that_was_hidden_stays_hidden() -> None:
    outer = ValueError("outer")
    outer.__context__, outer.__suppress_context__ = KeyError("hidden"), True
    assert "hidden" not in "".join(traceback.format_exception(travel(outer)))


def test_a_cause_that_cannot_travel_does_not_hold_up_the_exception() -> None:
    outer = ValueError("outer")
    outer.__cause__ = Unpicklable("inner")
    back = travel(outer)
    assert (type(back), back.args, back.__cause__) == (ValueError, ("outer",), None)
    assert "Unpicklable: inner" in back.__notes__[-1]  # it is in the remote traceback


def test_a_chain_too_long_to_travel_does_not_hold_up_the_exception() -> None:
    error = first = ValueError("outer")
    for n in range(5_000):
        error.__context__ = KeyError(n)
        error = error.__context__
    assert travel(first).args == ("outer",)


def test_an_exception_that_holds_itself_comes_back_so() -> None:
    error = Coded(1, hint="a")
    error.__dict__["again"] = error
    error.__cause__ = ValueError("cause")
    error.__cause__.__context__ = error
    back: Any = travel(error)
    assert back.again is back
    assert back.__cause__.__context__ is back


def test_notes_arrive_before_the_remote_traceback() -> None:
    error = ValueError("no")
    error.add_note("look at the logs")
    first, remote = travel(error).__notes__
    assert first == "look at the logs"
    assert remote.startswith("\nRemote traceback:\nTraceback (most recent call last):\n")
    assert remote.endswith("ValueError: no\nlook at the logs")


@pytest.mark.parametrize("error", [Unpicklable("locked"), ValueError(threading.Lock())], ids=["attribute", "argument"])
def test_an_exception_that_cannot_travel_is_a_serialization_error_with_its_type_and_text(error: Exception) -> None:
    back = travel(error)
    assert type(back) is SerializationError
    assert f"{type(error).__name__}: {error} (the exception itself could not be sent: " in str(back)
    assert "_thread.lock" in str(back)


def test_what_cannot_travel_still_counts_as_its_own_class_for_retries() -> None:
    packed = pack_exception(Unpicklable("locked"), lambda file: False)
    assert packed.bases[:2] == ("tests.test_serialization.Unpicklable", "builtins.Exception")


def test_bases_are_the_class_and_all_it_inherits_from() -> None:
    packed = pack_exception(FileNotFoundError(2, "gone"), lambda file: False)
    assert packed.type == "builtins.FileNotFoundError"
    assert packed.bases == (
        "builtins.FileNotFoundError",
        "builtins.OSError",
        "builtins.Exception",
        "builtins.BaseException",
    )


@pytest.mark.parametrize("kind", [BadStr, BadStrAndRepr])
def test_a_str_or_repr_that_raises_stops_nothing(kind: type[Exception]) -> None:
    back = travel(kind("x"))
    assert (type(back), back.args) == (kind, ("x",))
    assert pack_exception(kind("x"), lambda file: False).text == f"<{kind.__name__}, whose str raises RuntimeError>"


def test_safe_str_is_str_where_that_works() -> None:
    assert safe_str(ValueError("no")) == "no"
    assert safe_str(BadStr()) == "<BadStr, whose str raises RuntimeError>"


# --- what must never be raised at the caller -------------------------------------------------------------------------


class Stop(BaseException): ...


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Stop("own")])
def test_what_would_end_the_callers_program_arrives_as_an_execution_error(error: BaseException) -> None:
    packed = pack_exception(raised(error), lambda file: False)
    assert packed.pickle == b""
    back = unpack_exception(packed)
    assert type(back) is ExecutionError
    assert str(back) == f"{packed.type.removeprefix('builtins.')}: {error}"


def test_a_group_of_them_neither() -> None:
    assert type(travel(BaseExceptionGroup("both", [SystemExit(1), ValueError()]))) is ExecutionError


def test_a_pickle_of_one_is_not_raised_either() -> None:
    forged = Failure(type="builtins.SystemExit", text="3", pickle=dumps(SystemExit(3)))
    assert str(unpack_exception(forged)) == "SystemExit: 3"


@pytest.mark.parametrize("value", [5, ValueError, "text"])
def test_a_pickle_of_something_else_is_not_raised_either(value: object) -> None:
    forged = Failure(type="shop.SoldOut", text="no", pickle=dumps(value))
    assert (type(unpack_exception(forged)), str(unpack_exception(forged))) == (ExecutionError, "shop.SoldOut: no")


# --- what stands in for an exception ---------------------------------------------------------------------------------


def test_meshs_own_failures_need_no_pickle() -> None:
    back = unpack_exception(failure(FunctionTimeoutError, "too long"))
    assert (type(back), str(back)) == (FunctionTimeoutError, "too long")
    assert not hasattr(back, "__notes__")


@pytest.mark.parametrize("name", ["NotReadyError", "InputCancellation", "ServerWarning", "simulate_preemption", "nope"])
def test_other_names_of_meshs_exceptions_are_not_raised_by_name(name: str) -> None:
    """NotReadyError above all: it would look as if the call had no result yet."""
    assert type(unpack_exception(Failure(type=f"mesh.exception.{name}", text="x"))) is ExecutionError


def test_a_class_whose_module_is_missing_here_is_an_execution_error_that_names_it() -> None:
    pickled = b"cnowhere\nSoldOut\n."
    back = unpack_exception(Failure(type="nowhere.SoldOut", text="no", pickle=pickled, traceback="remote lines\n"))
    assert type(back) is ExecutionError
    assert str(back) == "nowhere.SoldOut: no (module 'nowhere', which defines it, cannot be imported here)"
    assert back.__notes__ == ["\nRemote traceback:\nremote lines"]


def test_a_class_that_is_gone_here_is_an_execution_error_with_the_reason() -> None:
    back = unpack_exception(Failure(type="json.Gone", text="no", pickle=b"cjson\nGone\n."))
    assert type(back) is ExecutionError
    assert str(back).startswith("json.Gone: no (cannot be rebuilt here: ")


def test_who_refuses_pickles_gets_every_exception_of_users_as_an_execution_error() -> None:
    packed = pack_exception(raised(Coded(5, hint="h")), lambda file: False)
    back = unpack_exception(packed, unpickle=False)
    assert (type(back), str(back)) == (ExecutionError, "tests.test_serialization.Coded: error 5")
    assert "Remote traceback" in back.__notes__[0]


def test_the_machinerys_own_frames_are_left_out_at_the_top_of_the_traceback() -> None:
    def user_code() -> None:
        json.loads("{")

    with pytest.raises(ValueError) as caught:
        user_code()
    shown = pack_exception(caught.value, lambda file: file == __file__).traceback
    assert "test_serialization" not in shown
    assert "json/decoder.py" in shown
    whole = pack_exception(caught.value, lambda file: False).traceback
    assert "in user_code" in whole


# --- scripts ---------------------------------------------------------------------------------------------------------


def main_module(monkeypatch: pytest.MonkeyPatch, spec: str | None, file: str | None) -> types.ModuleType:
    main = types.ModuleType("__main__")
    main.__spec__ = None if spec is None else importlib.machinery.ModuleSpec(spec, None)
    if file is not None:
        main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    return main


@pytest.mark.parametrize(
    ("spec", "file", "name"),
    [
        (None, "/home/ann/job.py", "job"),
        (None, "my-job.py", "my-job"),
        ("shop.tasks", "/home/ann/shop/tasks.py", "shop.tasks"),  # python -m shop.tasks
        ("shop.__main__", "/home/ann/shop/__main__.py", "shop.__main__"),  # python -m shop
        ("__main__", "/home/ann/shop/__main__.py", None),  # python shop/
        (None, None, None),  # a REPL, a notebook, python -c
        ("mesh.__main__", "/site-packages/mesh/__main__.py", None),
        ("mesh.cli", "/site-packages/mesh/cli/__init__.py", None),
    ],
)
def test_a_script_is_known_by_the_name_it_can_be_imported_under(
    spec: str | None, file: str | None, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    main_module(monkeypatch, spec, file)
    assert main_name() == name


SCRIPT = """
class Point:
    def __init__(self, x):
        self.x = x

    class Origin: ...

class Missed(Exception): ...

def double(n):
    return 2 * n
"""


def script(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`job.py`, run as `__main__`."""
    main = main_module(monkeypatch, None, "/home/ann/job.py")
    exec(SCRIPT, vars(main))
    return main


def imported(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`job.py`, imported under its name."""
    module = types.ModuleType("job")
    exec(SCRIPT, vars(module))
    monkeypatch.setitem(sys.modules, "job", module)
    return module


def test_what_a_script_defines_is_sent_under_the_name_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as there:
        main = script(there)
        sent = dumps([main.Point(5), main.Point.Origin, main.double, main.Missed("no")], "job")
    job = imported(monkeypatch)
    point, origin, double, missed = loads(sent)
    assert (type(point), point.x) == (job.Point, 5)
    assert (origin, double, type(missed)) == (job.Point.Origin, job.double, job.Missed)


def test_what_comes_back_under_that_name_is_the_scripts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as there:
        job = imported(there)
        sent = dumps([job.Point(5), job.double, job.Missed("no")])
    main = script(monkeypatch)
    point, double, missed = loads(sent)
    assert (type(point), double, type(missed)) == (main.Point, main.double, main.Missed)
    assert "job" not in sys.modules  # a script is never imported a second time


def test_without_a_name_what_a_script_defines_is_sent_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as there:
        main = script(there)
        main.Point.__module__ = "__main__"
        sent = dumps(main.Point(5), None)
    assert loads(sent).x == 5


def test_what_a_script_made_on_the_spot_is_sent_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as there:
        main = script(there)
        exec("triple = lambda n: 3 * n", vars(main))
        sent = dumps(main.triple, "job")
    assert loads(sent)(2) == 6


def test_a_package_run_with_m_keeps_its_identity(tmp_path: Path) -> None:
    """For real, once: only then are `__main__`, its spec and its file what Python makes them."""
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        textwrap.dedent("""
            import sys
            from mesh import serialization

            class Point: ...

            name = serialization.main_name()
            back = serialization.loads(serialization.dumps(Point(), name))
            print(name, type(back) is Point, name in sys.modules)
        """)
    )
    done = subprocess.run([sys.executable, "-m", "shop"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["shop.__main__", "True", "False"]


def test_serialization_is_the_only_way_in_and_out() -> None:
    assert serialization.loads is loads
    assert decode(Format.PICKLE, dumps({1, 2})) == {1, 2}


# --- sharing, and exceptions of unusual classes ----------------------------------------------------------------------


def test_a_list_that_is_in_a_value_twice_stays_one() -> None:
    inner: list[int] = [1]
    format, body = encode({"a": inner, "b": inner})
    back = decode(format, body)
    back["a"].append(2)
    assert back["b"] == [1, 2]


def test_deeply_shared_values_take_no_exponential_time() -> None:
    value: list[object] = []
    for _ in range(60):
        value = [value, value]
    format, body = encode(value)
    assert len(body) < 10_000
    assert decode(format, body)[0] is not None


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class OwnReduceError(Exception):
    def __reduce__(self) -> Any:
        return OwnReduceError, ("rebuilt",)


def test_an_exception_that_is_a_frozen_dataclass() -> None:
    back = unpack_exception(pack_exception(FrozenError(3), lambda file: False))
    assert isinstance(back, FrozenError)
    assert back.code == 3


def test_an_exception_with_its_own_reduce_keeps_its_cause() -> None:
    error = OwnReduceError("original")
    error.__cause__ = ValueError("why")
    back = unpack_exception(pack_exception(error, lambda file: False))
    assert (type(back), str(back), str(back.__cause__)) == (OwnReduceError, "rebuilt", "why")
