"""What can be imported from mesh: all that code written for Modal names, and nothing that says what it is not."""

from __future__ import annotations

import builtins
import importlib
import signal
import subprocess
import sys
import types
from typing import Any

import pytest

import mesh
from mesh import exception
from mesh.exception import DeprecationError, InvalidError, NotReadyError, UnimplementedError


def words(text: str) -> list[str]:
    return text.split()


# --- the names -------------------------------------------------------------------------------------------------------


def test_all_is_sorted_and_says_each_name_once() -> None:
    assert mesh.__all__ == sorted(set(mesh.__all__))
    assert exception.__all__ == sorted(set(exception.__all__))


def test_all_is_exactly_what_is_public() -> None:
    public = {name for name, value in vars(mesh).items() if not isinstance(value, types.ModuleType) and name[0] != "_"}
    assert public | {"__version__", "exception"} == set(mesh.__all__)


def test_all_exceptions_are_in_all_and_in_the_tree_at_the_top_of_the_file() -> None:
    defined = {name for name, value in vars(exception).items() if getattr(value, "__module__", "") == "mesh.exception"}
    assert defined == set(exception.__all__)
    drawn = exception.__doc__ or ""
    assert [name for name in defined if isinstance(getattr(exception, name), type) and name not in drawn] == []


MODAL = words("""
    App Client CloudBucketMount Cls Cron Dict Environment Error Function FunctionCall Image NetworkFileSystem Period
    Proxy Queue Retries Sandbox Secret Tunnel Volume Workspace asgi_app batched billing concurrent
    current_function_call_id current_input_id enable_output enter exception exit fastapi_endpoint forward interact
    is_local method parameter web_endpoint web_server wsgi_app
""")


@pytest.mark.parametrize("name", MODAL)
def test_a_public_name_of_modal_can_be_imported_from_mesh(name: str) -> None:
    assert name in mesh.__all__
    assert hasattr(mesh, name)


@pytest.mark.parametrize("name", ["Stub", "Mount", "gpu", "nothing"])
def test_a_name_that_modal_has_no_more_is_no_name_here(name: str) -> None:
    assert not hasattr(mesh, name)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("functions", ["Function", "FunctionCall"]),
        ("queue", ["Queue"]),
        ("exception", ["TimeoutError", "OutputExpiredError", "FunctionTimeoutError", "InvalidError", "NotFoundError"]),
    ],
)
def test_modals_submodules_have_the_same_things(module: str, names: list[str]) -> None:
    found = importlib.import_module(f"mesh.{module}")
    for name in names:
        assert getattr(found, name) is getattr(mesh, name, getattr(exception, name, None))


def test_modals_submodules_need_no_import_of_their_own() -> None:
    code = """
import mesh as modal
print(modal.functions.FunctionCall is modal.FunctionCall, modal.queue.Queue is modal.Queue)
print(issubclass(modal.exception.OutputExpiredError, modal.Error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3


def test_code_written_for_modal_runs_with_mesh_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modal", mesh)
    scope: dict[str, Any] = {"__name__": "written_for_modal"}
    exec("import modal\nfrom modal import App, Retries\napp = App('shop')\nerror = modal.exception.Error", scope)
    assert isinstance(scope["app"], mesh.App)
    assert scope["error"] is mesh.Error


# --- exceptions ------------------------------------------------------------------------------------------------------

CHILDREN = {
    "Error": """AlreadyExistsError AuthError ClientClosed ConnectionError DataLossError DeserializationError
        ExecutionError FilesystemExecutionError InternalError InternalFailure InvalidError LogsFetchError NotFoundError
        PermissionDeniedError RemoteError RequestSizeError ResourceExhaustedError SandboxFilesystemError
        SerializationError ServiceError TimeoutError UnimplementedError VersionError""",
    "TimeoutError": """ExecTimeoutError FunctionTimeoutError InteractiveTimeoutError MountUploadTimeoutError
        OutputExpiredError SandboxTimeoutError VolumeUploadTimeoutError""",
    "InvalidError": "ConflictError",
    "RemoteError": "ImageBuildError",
    "InternalFailure": "OutOfMemoryError",
}


@pytest.mark.parametrize("parent", CHILDREN)
def test_the_tree_of_exceptions_is_modals(parent: str) -> None:
    children = {
        cls.__name__ for cls in getattr(exception, parent).__subclasses__() if cls.__module__ == "mesh.exception"
    }
    assert children == set(CHILDREN[parent].split())


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("Error", Exception),
        ("ModuleNotMountable", Exception),
        ("InputCancellation", BaseException),
        ("AsyncUsageWarning", UserWarning),
        ("DeprecationError", UserWarning),
        ("ServerWarning", UserWarning),
        ("NotReadyError", builtins.TimeoutError),
    ],
)
def test_what_stands_beside_the_tree(name: str, base: type[BaseException]) -> None:
    assert getattr(exception, name).__bases__ == (base,)


@pytest.mark.parametrize("name", [n for n in exception.__all__ if n not in ("NotReadyError", "simulate_preemption")])
def test_only_not_ready_may_look_pending_to_a_poller(name: str) -> None:
    """`except TimeoutError: pending`: a dead call that were caught there would be polled for ever."""
    assert not issubclass(getattr(exception, name), builtins.TimeoutError)
    assert not issubclass(NotReadyError, exception.TimeoutError)


def test_an_image_that_cannot_be_built_says_which() -> None:
    error = exception.ImageBuildError("no such package", "im-1")
    assert (str(error), error.image_id, exception.ImageBuildError("x").image_id) == ("no such package", "im-1", "")


@pytest.mark.parametrize("seconds", [0, -1])
def test_preemption_needs_time_to_come(seconds: int) -> None:
    with pytest.raises(InvalidError, match=f"wait_seconds must be above 0, not {seconds}"):
        exception.simulate_preemption(seconds)


def test_preemption_comes_as_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGALRM)
    try:
        exception.simulate_preemption(1000)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGALRM)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- what is not built yet -------------------------------------------------------------------------------------------

CLASSES = words("""
    Client CloudBucketMount Dict Environment NetworkFileSystem Proxy Queue Sandbox Tunnel Volume Workspace billing
""")
FUNCTIONS = words("""
    forward
""")


@pytest.mark.parametrize("name", CLASSES)
def test_an_unbuilt_class_names_itself_when_it_is_used(name: str) -> None:
    unbuilt = getattr(mesh, name)
    for use in (unbuilt, lambda: unbuilt("x"), lambda: unbuilt(x=1)):
        with pytest.raises(UnimplementedError, match=f"^mesh.{name} is not built yet$"):
            use()
    with pytest.raises(UnimplementedError, match=rf"^mesh.{name}.from_name is not built yet$"):
        unbuilt.from_name("shop", "thing")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_unbuilt_decorator_names_itself_when_it_is_used(name: str) -> None:
    unbuilt = getattr(mesh, name)
    for use in (unbuilt, lambda: unbuilt(len), lambda: unbuilt(max_inputs=5)):
        with pytest.raises(UnimplementedError, match=f"^mesh.{name} is not built yet$"):
            use()


def test_a_decorator_that_modal_dropped_names_the_new_one() -> None:
    with pytest.raises(DeprecationError, match="web_endpoint is gone; use fastapi_endpoint"):
        mesh.web_endpoint(method="POST")


def test_an_unbuilt_class_can_still_be_used_as_a_type() -> None:
    assert not isinstance(5, mesh.Volume)
    assert mesh.Volume.__name__ == "Volume"
    with pytest.raises(AttributeError):
        _ = mesh.Volume.__wrapped__  # what inspect and mock look for


UNBUILT_METHODS: dict[object, list[str]] = {
    mesh.FunctionCall.from_id("fc-0"): words("get_call_graph"),
    mesh.App(): words("server get_dashboard_url"),
}


@pytest.mark.parametrize(("owner", "name"), [(o, name) for o, names in UNBUILT_METHODS.items() for name in names])
def test_an_unbuilt_method_names_itself_when_it_is_called(owner: object, name: str) -> None:
    with pytest.raises(UnimplementedError, match=rf"{name} is not built yet$"):
        getattr(owner, name)()
