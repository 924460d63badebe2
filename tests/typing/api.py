"""Never run, only checked: the types that users see, through both faces. mypy and pyright must agree with each line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, assert_type

import mesh

app = mesh.App("typed")


@app.function()
def double(x: int, *, plus: int = 0) -> str:
    return str(2 * x + plus)


@app.function(retries=mesh.Retries(max_retries=3), timeout=10)
async def later(x: int) -> list[int]:
    return [x]


@app.function()
def numbers(n: int) -> Iterator[int]:
    yield from range(n)


@app.cls(max_containers=2)
class Model:
    size: str = mesh.parameter(default="small")

    @mesh.enter()
    def load(self) -> None: ...

    @mesh.method()
    def ask(self, question: str) -> int:
        return len(question + self.size)

    @mesh.method()
    async def later(self, question: str) -> str:
        return question + str(self.ask.local(question))

    @mesh.exit()
    async def close(self) -> None: ...


@app.local_entrypoint()
def main(name: str) -> int:
    return len(name)


def blocking() -> None:
    assert_type(double.remote(3), str)
    assert_type(double.remote(3, plus=1), str)
    assert_type(later.remote(3), list[int])
    for item in numbers.remote_gen(3):
        assert_type(item, Any)
    call = double.spawn(3)
    assert_type(call, mesh.FunctionCall[str])
    assert_type(call.get(), str)
    assert_type(call.get(timeout=1.5), str)
    assert_type(later.spawn(1).get(), list[int])
    assert_type(call.object_id, str)
    assert_type(call.num_inputs(), int)
    assert_type(mesh.FunctionCall.gather(call, call), list[Any])
    assert_type(double.hydrate().remote(1), str)
    assert_type(list(double.map([1, 2], kwargs={"plus": 1}, order_outputs=False)), list[str])
    for value in later.starmap([(1,)], return_exceptions=True):
        assert_type(value, list[int])
    double.for_each(range(3), ignore_exceptions=True)
    assert_type(main("x"), int)
    assert_type(mesh.FunctionCall.from_id("fc-…"), mesh.FunctionCall[Any])
    with app.run() as running:
        assert_type(running, mesh.App)
    assert_type(app.deploy(), mesh.App)


def of_classes() -> None:
    # mypy sees no dataclass_transform on a method (2.4.1), so it does not know the parameters of constructors.
    model = Model(size="big")  # type: ignore[call-arg]
    assert_type(model, Model)
    assert_type(model.size, str)
    assert_type(model.ask.remote("?"), int)
    assert_type(model.later.remote("?"), str)
    assert_type(list(Model("big").ask.map(["?"])), list[int])  # type: ignore[call-arg]
    assert_type(double.with_options(timeout=3, retries=0).remote(1), str)
    assert_type(double.with_concurrency(max_inputs=3).remote(1), str)
    found = mesh.Cls.from_name("app", "Model").with_options(max_containers=1)
    assert_type(found, mesh.Cls)
    found(size="big").ask.remote("?")


async def awaiting() -> None:
    assert_type(await double.remote.aio(3), str)
    call = await double.spawn.aio(3, plus=2)
    assert_type(call, mesh.FunctionCall[str])
    assert_type(await call.get.aio(timeout=0), str)
    assert_type(await later.remote.aio(1), list[int])
    assert_type(await mesh.FunctionCall.gather.aio(call), list[Any])
    assert_type([x async for x in double.map.aio([1])], list[str])
    assert_type([x async for x in later.map([1])], list[list[int]])
    assert_type([x async for x in double.starmap.aio(double.map.aio([1]))], list[str])
    await double.for_each.aio([1])
    async with app.run() as running:
        assert_type(running, mesh.App)


def by_name() -> None:
    found = mesh.Function.from_name("app", "f")
    found.remote(1, "anything", goes=True)
    found.spawn().get()


def refused() -> None:
    double.remote("3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    double.remote()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    double.spawn(3, minus=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    double.map([1], unordered=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    double.starmap([1])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    later.remote("x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Model(colour="red")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Model().ask.remote(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    double(3)  # type: ignore[operator]  # pyright: ignore[reportCallIssue]


async def refused_awaiting() -> None:
    await double.remote.aio("3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await double.spawn.aio()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def what_a_function_is(given: Callable[[int], str]) -> None:
    made = app.function(serialized=True)(given)
    assert_type(made.remote(1), str)
