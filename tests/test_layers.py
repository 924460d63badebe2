"""Who may import whom. Each wall says why it stands: whoever wants to move one argues with that."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom to the top. A module imports what stands below it, or before it on its own level.
LEVELS = [
    "exception labels payload parameters secretref webspec imagespec spec decorators web",  # values, of users
    "config background processes scratch unbuilt",  # and of processes
    "protocol variant flow frames records buffers serialization bundle judge mask sealing",  # bytes, sent and stored
    "topology broker",  # JetStream: as data, and for real
    "_sync context client status stats vault",  # what callers and containers share
    "place hosts settle cancel behind dead",  # how calls end, and are sent again
    "secret localfiles image options target progress iterating call inputs submission map reading sdk",  # what
    "functions queue cls report deploy apprun app",  # users hold
    "wire generating output asgi proxy site",  # containers, from inside: what goes in and out
    "usercode interrupts answers serving executor zygote",  # and what is run
    "memory machine placement programs pythons debian imagebuild envcache environments",  # what a worker has
    "runs pipes nursery container execution",  # containers, from outside
    "capacity autoscaler scaling codecache",  # how many, and what they run
    "ends examine sweep upkeep watch check fleet slots request payloadfiles intake pool deployed",  # a worker
    "source server places visit gateway worker up",  # daemons
    "cli __main__",
]
ORDER = " ".join(LEVELS).split()


def modules() -> dict[str, Path]:
    """Every module of mesh but `mesh/__init__.py`, by its name after `mesh.`."""
    paths = sorted((ROOT / "mesh").rglob("*.py"))
    names = [".".join(p.relative_to(ROOT / "mesh").with_suffix("").parts).removesuffix(".__init__") for p in paths]
    return {name: path for name, path in zip(names, paths, strict=True) if name != "__init__"}


MODULES = modules()


def part(module: str) -> str:
    """The file or package right under `mesh/` that a module belongs to."""
    return module.partition(".")[0]


@functools.cache
def tree_of(source: str) -> ast.Module:
    return ast.parse(source)


def imports(source: str, *, types_too: bool = False) -> Iterator[str]:
    """What a source imports, at its top or inside functions; what only type checkers see, if asked."""
    todo: list[ast.AST] = [tree_of(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types_too:
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here, so that they can be read and searched alike"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(source: str) -> set[str]:
    """The parts of mesh that a source imports at run time; "" for a name taken from `mesh/__init__.py`."""
    found = set()
    for name in imports(source):
        if name.startswith("mesh."):
            found.add(part(name.removeprefix("mesh.")) if part(name.removeprefix("mesh.")) in ORDER else "")
    return found


def importers(package: str) -> set[str]:
    """The parts of mesh that import something of a package, if only for its types."""
    return {
        part(name)
        for name, path in MODULES.items()
        if any(i.partition(".")[0] == package for i in imports(path.read_text(), types_too=True))
    }


def users(module: str, names: set[str]) -> set[str]:
    """The parts of mesh that use one of these names of `module`, taken from it or looked up in it."""
    found = set()
    for name, path in MODULES.items():
        source = path.read_text()
        taken = {i.removeprefix(f"mesh.{module}.") for i in imports(source) if i.startswith(f"mesh.{module}.")}
        looked_up = {
            node.attr
            for node in ast.walk(tree_of(source))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (module, f"mesh.{module}")
        }
        if (taken | looked_up) & names:
            found.add(part(name))
    return found


def python(code: str) -> list[str]:
    """What a fresh interpreter prints, by words."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


# --- the levels ------------------------------------------------------------------------------------------------------


def test_every_module_has_its_place() -> None:
    unplaced = {part(name) for name in MODULES} - set(ORDER)
    assert not unplaced, f"say in LEVELS where {unplaced} stand(s): what may it import, and who may import it?"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_below_it(module: str) -> None:
    below = {*ORDER[: ORDER.index(part(module))], part(module)}
    above = ours(MODULES[module].read_text()) - below - {""}
    assert not above, f"{module} imports {above}, which stand(s) above it: then neither can be read or tested alone"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_takes_nothing_from_the_facade(module: str) -> None:
    assert "" not in ours(MODULES[module].read_text()), (
        f"{module} imports a name from mesh/__init__.py, which imports it in turn: take it from where it is made"
    )


# --- the walls -------------------------------------------------------------------------------------------------------


def test_only_the_broker_talks_to_nats() -> None:
    assert importers("nats") == {"broker"}, (
        "every wait on the server is bounded and every error of it translated in one place; "
        "and whoever imports nats takes 100 ms longer to start"
    )


@pytest.mark.parametrize("package", ["pickle", "cloudpickle"])
def test_only_serialization_pickles(package: str) -> None:
    assert importers(package) == {"serialization"}, (
        "exceptions travel by parts and scripts keep their identity only through serialization's own pickler"
    )


def test_only_the_caller_and_the_container_turn_users_bytes_into_objects() -> None:
    readers = users("serialization", {"loads", "decode", "decode_arguments", "unpack_exception"})
    assert readers == {"call", "answers", "usercode"}, (
        "unpickling runs whatever code the bytes ask for: a worker, which holds the credentials, must never do it"
    )


def test_whoever_only_passes_users_bytes_on_does_not_know_serialization() -> None:
    knowing = {part(name) for name, path in MODULES.items() if "serialization" in ours(path.read_text())}
    assert knowing == {"sdk", "call", "answers", "generating", "usercode", "deploy"}, (
        "worker, broker and command line see users' data as bytes; so nobody unpickles by accident in a process that "
        "may do anything"
    )


def test_only_settings_read_the_environment() -> None:
    reading = {
        part(name)
        for name, path in MODULES.items()
        if any(
            isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")
            for n in ast.walk(tree_of(path.read_text()))
        )
    }
    assert reading == {
        *("config", "container", "up", "zygote", "secret", "proxy", "executor"),
        *("programs", "pythons", "imagebuild", "environments"),
    }, (
        "a setting that another module reads has no origin that `mesh config show` could tell; "
        "container and up only pass variables on to the processes they start, and zygote gives containers theirs; "
        "secret takes what its user names; proxy tells the server that it has started by its user where to listen; "
        "executor looks whether user code has changed any; "
        "what builds images passes on where packages and programs come from"
    )


def test_only_the_command_line_knows_how_it_is_parsed_and_shown() -> None:
    assert importers("typer") == importers("rich") == {"cli"}, (
        "everything a command does can be done from Python, without the time these take to import"
    )


# --- what an import costs --------------------------------------------------------------------------------------------


def test_importing_mesh_loads_neither_nats_nor_asyncio_nor_typer() -> None:
    heavy = python("import sys, mesh; print(*{'nats', 'asyncio', 'typer', 'mesh.broker'} & set(sys.modules))")
    assert not heavy, f"`import mesh` loads {heavy}: every container imports it, and pays before the user's first line"


def test_declaring_a_function_loads_them_neither() -> None:
    code = """
import sys, mesh
app = mesh.App("shop")
@app.function()
def f(): ...
call = mesh.FunctionCall.from_id("fc-0"), mesh.Function.from_name("shop", "f")
print(*{"nats", "asyncio", "typer", "mesh.broker", "mesh.deploy"} & set(sys.modules))
"""
    heavy = python(code)
    assert not heavy, f"a module that declares functions loads {heavy}: every container imports such a module"


def test_a_container_imports_neither_broker_nor_worker() -> None:
    loaded = set(python("import sys, mesh.executor; print(*sys.modules)"))
    assert "mesh.executor" in loaded
    forbidden = {"nats", "mesh.broker", "mesh.worker", "mesh.container", "mesh.config", "typer"}
    assert not forbidden & loaded, (
        f"a container imports {forbidden & loaded}: it starts in milliseconds because it does not, and one that makes "
        "no call of its own needs no connection"
    )


def test_a_container_needs_nothing_but_the_standard_library_msgpack_and_cloudpickle() -> None:
    code = "import sys; before = set(sys.modules); import mesh.executor; print(*set(sys.modules) - before)"
    loaded = {name.partition(".")[0] for name in python(code)}
    files = {name for name in loaded if not name.startswith(("_", "cython"))}  # parts of what is compiled
    assert files - sys.stdlib_module_names == {"mesh", "msgpack", "cloudpickle"}, (
        "these come into the environment of every function, where any other package may be of another version"
    )


# --- the test itself -------------------------------------------------------------------------------------------------


def test_imports_are_seen_wherever_they_stand() -> None:
    source = """
import os.path, mesh
from mesh import broker, App
if TYPE_CHECKING:
    from mesh.worker import Worker
else:
    import mesh.pool
def f():
    async def g():
        from mesh.sdk import Function as F
"""
    seen = {"os.path", "mesh", "mesh.broker", "mesh.App", "mesh.pool", "mesh.sdk.Function"}
    assert set(imports(source)) == seen
    assert set(imports(source, types_too=True)) == {*seen, "mesh.worker.Worker"}
    assert ours(source) == {"broker", "pool", "sdk", ""}
