"""User code that is measured with: modules made of text, as a deploy needs files."""

from __future__ import annotations

_FUNCTION = """

@app.function(retries=2, timeout=600)
def work_{number}() -> float:
    return time.time()
"""

_MANY_APPS = """
import time

import mesh

apps = [mesh.App(f"app-{{number}}") for number in range({count})]


def work() -> float:
    return time.time()


for app in apps:
    app.function()(work)


def deploy() -> None:
    for app in apps:
        app.deploy()
"""


def one_app(name: str, count: int) -> str:
    """A module with an app of `count` functions, which say when they began."""
    functions = "".join(_FUNCTION.format(number=number) for number in range(count))
    return f"import time\n\nimport mesh\n\napp = mesh.App({name!r})\n{functions}"


def many_apps(count: int) -> str:
    """A module with `count` apps of one function."""
    return _MANY_APPS.format(count=count)


# `now` says when its first line ran, in a container that no call ran in before; `rest` keeps its own to itself.
COLD = """
import time

import mesh

app = mesh.App("cold")


@app.function(single_use_containers=True)
def now() -> float:
    return time.time()


@app.function()
def rest(gate) -> None:
    while not gate.exists():
        time.sleep(0.1)
"""

CALLS = """
import asyncio
import time

import mesh

app = mesh.App("bench")


@app.function()
def noop(x: int) -> int:
    return x


@app.function()
def sleep(x: int) -> int:
    time.sleep(0.01)
    return x


@app.function()
@mesh.concurrent(max_inputs=50)
def sleep_in_threads(x: int) -> int:
    time.sleep(0.01)
    return x


@app.function()
@mesh.concurrent(max_inputs=50)
async def sleep_in_tasks(x: int) -> int:
    await asyncio.sleep(0.01)
    return x
"""
