"""Classes of the mesh: parameters and their pools, methods, what runs at start and end, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import Callable

import pytest

import mesh
from mesh import Cls, sweep
from mesh.broker import Broker, pools
from mesh.exception import ExecutionError, InvalidError, NotFoundError
from mesh.parameters import Construction, Parameter, bind
from mesh.sweep import Sweeper
from tests.support import Mesh, until

SHOP = """
import os
import mesh

app = mesh.App("{name}")

class Base:
    currency: str = mesh.parameter(default="EUR")

    @mesh.enter()
    def open(self):
        self.steps = ["open"]

    @mesh.method()
    def price(self, amount):
        return f"{{amount}} {{self.currency}}"

    @mesh.method()
    def overridden(self):
        return "base"

@app.cls(scaledown_window=60, retries=mesh.Retries(max_retries=1, initial_delay=60))
class Shop(Base):
    size: int = mesh.parameter(default=1)

    @mesh.enter()
    async def stock(self):
        self.steps.append(f"stock {{self.size}}")

    @mesh.exit()
    def close(self):
        with open(os.environ.get("LEDGER", os.devnull), "a") as ledger:
            ledger.write(f"closed {{self.size}}\\n")

    @mesh.method()
    def told(self):
        return self.steps, os.getpid()

    @mesh.method()
    async def later(self, amount):
        return await self.price.remote.aio(amount)

    @mesh.method()
    def here(self, amount):
        return self.price.local(amount)

    @mesh.method()
    def count(self, to):
        yield from range(to * self.size)

    @mesh.method()
    async def fails(self):
        yield 1
        raise ValueError("half-way")

    @mesh.method()
    def overridden(self):
        return "derived"

@app.cls(env={{"LEDGER": "{ledger}"}}, scaledown_window=1)
class Ends:
    name: str = mesh.parameter()

    @mesh.exit()
    def one(self):
        self._tell("one")

    @mesh.exit()
    async def two(self):
        self._tell("two")

    def _tell(self, what):
        with open(os.environ["LEDGER"], "a") as ledger:
            ledger.write(f"{{self.name}} {{what}}\\n")

    @mesh.method()
    def use(self):
        return self.name

@app.cls()
class Own:
    def __init__(self, start, step=1):
        self.start, self.step = start, step

    @mesh.method()
    def next(self):
        return self.start + self.step

@app.cls()
class Broken:
    @mesh.enter()
    def fail(self):
        raise ValueError("no stock")

    @mesh.method()
    def ask(self):
        return 1

@app.function()
def who(name: str = ""):
    return os.environ.get("WHO", ""), os.getpid()

@app.function(retries=3)
def fails():
    raise ValueError("always")
"""


@pytest.fixture
def shop(mesh: Mesh, request: pytest.FixtureRequest) -> object:
    name = request.node.name.replace("[", "-").replace("]", "")
    return mesh.deploy(SHOP.format(name=name, ledger=mesh.directory / f"ledger-{name}"))


# --- calling ---------------------------------------------------------------------------------------------------------


def test_methods_are_called_in_every_way_a_function_is(shop: object) -> None:
    model = shop.Shop()
    assert model.price.remote(2) == "2 EUR"
    assert model.price.spawn(3).get() == "3 EUR"
    assert list(model.price.map([1, 2])) == ["1 EUR", "2 EUR"]
    assert model.later.remote(4) == "4 EUR"
    assert model.here.remote(5) == "5 EUR"
    assert list(shop.Shop(size=2).count.remote_gen(2)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="half-way"):  # at once: the class's retries are not for generators
        list(model.fails.remote_gen())
    with pytest.raises(InvalidError, match=r"'Shop.count' is a generator function: use .remote_gen\(\)"):
        model.count.remote(1)
    assert asyncio.run(model.price.remote.aio(6)) == "6 EUR"
    assert model.overridden.remote() == "derived"


def test_a_call_is_its_method_s_before_and_after_it_has_ended(shop: object) -> None:
    call = shop.Shop().price.spawn(2)
    call.get()
    assert call.status().function == "Shop.price"


def test_each_set_of_parameters_has_containers_of_its_own(shop: object) -> None:
    steps, first = shop.Shop().told.remote()
    assert steps == ["open", "stock 1"]
    same = [shop.Shop().told, shop.Shop("EUR", 1).told, shop.Shop(size=1).told]
    assert {told.remote()[1] for told in same} == {first}, "the defaults are the same pool, however they are said"
    steps, other = shop.Shop(size=2, currency="CHF").told.remote()
    assert steps == ["open", "stock 2"]
    assert other != first
    assert shop.Shop("CHF", 2).told.remote()[1] == other
    assert shop.Shop("CHF", 2).price.remote(1) == "1 CHF"


def test_another_process_means_the_same_pool(shop: object, mesh: Mesh) -> None:
    _, container = shop.Shop(size=7).told.remote()
    program = f"""
        import mesh
        Shop = mesh.Cls.from_name({shop.app.name!r}, "Shop")
        print(Shop(size=7).told.remote()[1], Shop(size=7).price.remote(1))
    """
    assert mesh.python(program).stdout.split() == [str(container), "1", "EUR"]


def test_handles_travel(shop: object) -> None:
    shop.Shop().price.remote(1)
    for handle in (shop.Shop(size=3), shop.Shop(size=3).price, shop.Shop.with_options(timeout=9)(size=3).price):
        found = pickle.loads(pickle.dumps(handle))
        price = found if isinstance(found, mesh.Function) else found.price
        assert price.remote(1) == "1 EUR"


def test_a_class_with_a_constructor_of_its_own(shop: object) -> None:
    assert shop.Own(10).next.remote() == 11
    assert shop.Own(10, step=5).next.remote() == 15
    with pytest.raises(InvalidError, match=r"Own: argument 1 is .*; constructors take str, int, float, bool, bytes"):
        shop.Own(object())
    with pytest.raises(TypeError, match="missing a required argument: 'start'"):
        shop.Own()


# --- on this machine -------------------------------------------------------------------------------------------------


def test_a_local_call_enters_once_and_an_attribute_does_not() -> None:
    app = mesh.App("local")
    entered = []

    @app.cls(serialized=True)
    class Model:
        size: int = mesh.parameter(default=1)
        kind = "plain"

        @mesh.enter()
        async def load(self) -> None:
            entered.append(self.size)

        @mesh.method()
        def ask(self, more: int) -> int:
            return self.size + more

    model = Model(size=2)
    assert (model.size, model.kind, entered) == (2, "plain", [])
    assert (model.ask.local(1), model.ask.local(2), entered) == (3, 4, [2])
    with pytest.raises(AttributeError, match="nothing"):
        model.nothing  # noqa: B018


def test_an_instance_says_how_many_containers_it_has(shop: object) -> None:
    model = shop.Shop(size=6)
    settings = model.update_autoscaler(min_containers=1, scaledown_window=5)
    assert (settings.min_containers, settings.scaledown_window) == (1, 5)
    until(lambda: model.get_current_stats().num_total_runners == 1, what="its one container is there")
    assert model.update_autoscaler(min_containers=0).scaledown_window == 5
    with pytest.raises(InvalidError, match=r"its containers are those of the instance, Shop\(…\).update_autoscaler"):
        model.price.update_autoscaler(min_containers=1)


# --- start and end ---------------------------------------------------------------------------------------------------


def test_what_runs_at_the_end_runs_at_scale_down(shop: object, mesh: Mesh) -> None:
    ledger = mesh.ledger(f"ledger-{shop.app.name}")
    assert shop.Ends("alone").use.remote() == "alone"
    until(lambda: ledger.lines() == ["alone one", "alone two"], what="both exit hooks ran, in their order")


def test_what_runs_at_the_end_runs_when_its_worker_stops(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    source = SHOP.format(name="shop", ledger=mesh.directory / "ledger").replace("scaledown_window=1", "")
    shop = mesh.deploy(source)
    worker = mesh.start_worker()
    assert shop.Ends("kept").use.remote() == "kept"
    assert mesh.ledger().lines() == []
    assert worker.stop() == 0
    assert mesh.ledger().lines() == ["kept one", "kept two"]


def test_an_instance_that_cannot_be_entered_says_why(shop: object) -> None:
    call = shop.Broken().ask.spawn()
    until(lambda: "ValueError: no stock" in call.status().waiting_for, what="the call says why it waits")
    call.cancel()


def test_a_constructor_that_cannot_be_called_fails_the_call(own_mesh: Callable[..., Mesh]) -> None:
    """Who looks a class up by name cannot know; and code that can be called so may be deployed."""
    mesh = own_mesh()
    source = SHOP.format(name="constructors", ledger=mesh.ledger("ledger"))
    deployed = mesh.deploy(source)
    mesh.start_worker()
    own = Cls.from_name("constructors", "Own")
    for wrong in own(1, 2, 3), own(stop=1), own():
        for _ in range(2):
            with pytest.raises(TypeError, match=r"^Own\(\): (too many|missing a required|got an unexpected)"):
                wrong.next.remote()
    mesh.redeploy(deployed, source.replace("start, step=1)", "start, step=1, *others)"))
    assert own(1, 2, 3).next.remote() == 3


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_method_on_the_class_is_no_method(shop: object) -> None:
    with pytest.raises(AttributeError, match=r"did you forget to make one, Shop\(\)\.price\?"):
        shop.Shop.price.remote(1)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        shop.Shop.nothing  # noqa: B018


def test_what_is_not_deployed_shows_at_its_first_use(shop: object) -> None:
    name = shop.app.name
    with pytest.raises(NotFoundError, match=f"Lookup failed for Function 'Nothing.ask' from the '{name}' app"):
        mesh.Cls.from_name(name, "Nothing")().ask.remote()
    with pytest.raises(NotFoundError, match="has no method 'ask'; it has count, fails, here, later"):
        mesh.Cls.from_name(name, "Shop")().ask.remote()
    for call in (mesh.Function.from_name(name, "Shop").remote, mesh.Function.from_name(name, "Shop").spawn):
        with pytest.raises(InvalidError, match=rf"'Shop' is a class: .* mesh.Cls.from_name\('{name}', 'Shop'\)\(\)\."):
            call()
    with pytest.raises(NotFoundError, match=r"'who' of app .* is a function, which has no method 'ask'"):
        mesh.Cls.from_name(name, "who")().ask.remote()
    with pytest.raises(TypeError, match=r"Shop\(\) has no parameter 'color'; it has currency, size"):
        mesh.Cls.from_name(name, "Shop")(color="red").told.remote()
    with pytest.raises(ExecutionError, match="was looked up by name"):
        mesh.Cls.from_name(name, "Shop")().told.local()


def test_parameters_are_checked_where_they_are_given(shop: object) -> None:
    with pytest.raises(TypeError, match=r"Shop\(\) has no parameter 'q'; it has currency, size"):
        shop.Shop(q=1)
    with pytest.raises(InvalidError, match="parameter 'size' must be int, not str"):
        shop.Shop(size="big")
    with pytest.raises(TypeError, match=r"Ends\(\) needs a value for the parameter 'name'"):
        shop.Ends()
    with pytest.raises(InvalidError, match=r"the parameters take .* bytes; the limit is 16,384"):
        shop.Shop(currency="x" * 20_000)


def test_classes_that_cannot_be() -> None:
    app = mesh.App("refused")
    with pytest.raises(InvalidError, match="has no method to call: mark one"):

        @app.cls(serialized=True)
        class Empty: ...

    with pytest.raises(InvalidError, match="parameter 'x' of class 'Bare' has no annotation"):

        @app.cls(serialized=True)
        class Bare:
            x = mesh.parameter()

            @mesh.method()
            def ask(self) -> None: ...

    with pytest.raises(InvalidError, match="must be annotated as one of str, int, bool, bytes"):

        @app.cls(serialized=True)
        class Typed:
            x: list[int] = mesh.parameter()

            @mesh.method()
            def ask(self) -> None: ...

    with pytest.raises(InvalidError, match="an __init__ of its own beside"):

        @app.cls(serialized=True)
        class Both:
            x: int = mesh.parameter()

            def __init__(self) -> None: ...

            @mesh.method()
            def ask(self) -> None: ...

    with pytest.raises(InvalidError, match=r"cannot be both a method and @mesh.enter\(\)"):

        class Twice:
            @mesh.method()
            @mesh.enter()
            def ask(self) -> None: ...

    with pytest.raises(TypeError, match=r"for .* use @app.function\(\)"):
        app.cls()(lambda: None)  # type: ignore[arg-type]
    for bare in (app.cls, mesh.method, mesh.enter, mesh.exit):
        with pytest.raises(InvalidError, match="forget the parentheses"):
            bare(int)  # type: ignore[operator]


def test_calls_of_a_method_that_is_gone_fail(shop: object, mesh: Mesh) -> None:
    assert shop.Shop(size=9).overridden.remote() == "derived"
    source = SHOP.format(name=shop.app.name, ledger="/dev/null")
    for where in ("base", "derived"):
        source = source.replace(f'    @mesh.method()\n    def overridden(self):\n        return "{where}"\n', "")
    handle = shop.Shop(size=9).overridden
    mesh.redeploy(shop, source)

    def is_gone() -> bool:  # this process may remember the class for half a minute, the worker hears of it at once
        with contextlib.suppress(NotFoundError):
            return not handle.remote()
        return True

    until(is_gone, what="the worker knows that the method is gone")


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_have_containers_of_their_own(shop: object) -> None:
    plain, container = shop.who.remote()
    other = shop.who.with_options(env={"WHO": "me"})
    name, second = other.remote()
    assert (plain, name) == ("", "me")
    assert second != container
    assert shop.who.with_options(env={"WHO": "me"}).remote() == ("me", second), "equal options are one pool"
    assert mesh.Function.from_name(shop.app.name, "who").with_options(env={"WHO": "me"}).remote() == ("me", second)
    assert other.with_options(timeout=17, env={"WHO": "you"}).remote()[0] == "you"
    assert shop.who.with_options(result_ttl=100).remote() == ("", container), "what shapes the call alone is no pool"
    assert shop.who.remote() == ("", container)


def test_options_are_in_force(shop: object, mesh: Mesh) -> None:
    call = shop.fails.with_options(retries=0).spawn()
    with pytest.raises(ValueError, match="always"):
        call.get(timeout=20)
    assert call.status().attempts == 1


def test_options_are_checked_at_once(shop: object) -> None:
    with pytest.raises(InvalidError, match="timeout must be a number from 1"):
        shop.who.with_options(timeout=0)
    with pytest.raises(TypeError, match="min_containers"):
        shop.who.with_options(min_containers=1)
    with pytest.raises(InvalidError, match=r"options are those of its class, Shop.with_options"):
        shop.Shop().price.with_options(timeout=2)


def test_options_of_a_class_are_for_all_its_methods(shop: object) -> None:
    other = shop.Shop.with_options(timeout=11)
    steps, container = other(size=4).told.remote()
    assert steps == ["open", "stock 4"]
    assert container != shop.Shop(size=4).told.remote()[1]
    assert other(size=4).price.remote(1) == "1 EUR"


def test_a_single_run_leaves_no_pool_behind(mesh: Mesh) -> None:
    module = mesh.load(SHOP.format(name="once", ledger="/dev/null"))
    with module.app.run():
        wire = module.app.app_id
        assert module.Shop(size=5).price.remote(1) == "1 EUR"
        assert module.who.with_options(env={"WHO": "me"}).remote()[0] == "me"

        async def left(broker: Broker) -> list[str]:
            pools = [str(record.key) for record in await broker.pools.all() if record.app == wire]
            return pools + [name for name in await broker.consumers.names() if name.startswith(f"{wire}+")]

        assert len(mesh.ask(left)) > 2
    until(lambda: mesh.ask(left) == [], what="its pools and their consumers are gone")


# --- pools that come and go ------------------------------------------------------------------------------------------


def test_a_worker_that_comes_later_finds_the_pools(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    shop = mesh.deploy(SHOP.format(name="shop", ledger="/dev/null"))
    calls = [shop.Shop(size=3).told.spawn(), shop.who.with_options(env={"WHO": "me"}).spawn()]
    mesh.start_worker()
    assert calls[0].get(timeout=30)[0] == ["open", "stock 3"]
    assert calls[1].get(timeout=30)[0] == "me"


def test_a_new_method_is_delivered_in_every_pool(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    source = SHOP.format(name="shop", ledger="/dev/null")
    shop = mesh.deploy(source)
    mesh.start_worker()
    assert shop.Shop(size=3).price.remote(1) == "1 EUR"
    added = source.replace(
        "    @mesh.method()\n    def told",
        "    @mesh.method()\n    def new(self):\n        return 'new'\n\n    @mesh.method()\n    def told",
    )
    shop = mesh.redeploy(shop, added)
    assert shop.Shop(size=3).new.remote() == "new"
    assert shop.Shop().new.remote() == "new"
    assert shop.Shop(size=3).price.remote(1) == "1 EUR"


def test_a_pool_whose_consumer_was_deleted_goes_on(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    shop = mesh.deploy(SHOP.format(name="shop", ledger="/dev/null"))
    mesh.start_worker()
    assert shop.Shop(size=3).price.remote(1) == "1 EUR"
    (pool,) = mesh.ask(lambda broker: broker.pools.all())
    mesh.ask(lambda broker: broker.consumers.remove(broker.topology.consumer(pool.key)))
    assert shop.Shop(size=3).price.remote(2) == "2 EUR"


def test_a_pool_that_nobody_calls_is_forgotten_and_comes_back(
    own_mesh: Callable[..., Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = own_mesh()
    shop = mesh.deploy(SHOP.format(name="shop", ledger="/dev/null"))
    waiting = shop.Shop(size=2).price.spawn(1)
    unused = shop.Shop(size=3).price.spawn(1)
    unused.cancel()
    monkeypatch.setattr(sweep, "KEPT_UNUSED", 0.0)

    async def sweep_now(broker: Broker) -> tuple[list[int], int]:
        await broker.consumers.add(await broker.registry.methods(await broker.wanted_pools()), 15)
        await Sweeper(broker, "test", 15, 60).unused_pools()
        kept = [record.variant.construction.kwargs["size"] for record in await broker.pools.all()]
        return kept, len(await broker.consumers.names())

    kept, consumers = mesh.ask(sweep_now)
    assert kept == [2], "one that has something queued stays"
    assert consumers == len(shop.app.definitions) + 1
    mesh.start_worker()
    assert waiting.get(timeout=30) == "1 EUR"
    monkeypatch.setattr(pools, "_RENEWED", 0.0)  # as for a client that called an hour ago
    assert shop.Shop(size=3).price.remote(1) == "1 EUR"


def test_a_call_to_a_pool_nobody_knows_ends(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    shop = mesh.deploy(SHOP.format(name="shop", ledger="/dev/null"))
    call = shop.Shop(size=3).price.spawn(1)

    async def lose(broker: Broker) -> int:
        await broker.pools.erase("shop")
        sweeper = Sweeper(broker, "test", 15, 60)
        return await sweeper.orphans(0) + await sweeper.orphans(0)  # a difference counts when it is seen twice

    assert mesh.ask(lose) == 1
    with pytest.raises(NotFoundError, match=r"no function 'Shop.price' in app 'shop', or nothing says what its pool"):
        call.get()


# --- pure ------------------------------------------------------------------------------------------------------------


def test_the_name_of_a_pool_depends_on_values_alone() -> None:
    parameters = {"a": Parameter("int", 1), "b": Parameter("str", "x")}
    one = bind("C", parameters, Construction((2,), {}))
    other = bind("C", parameters, Construction((), {"b": "x", "a": 2}))
    assert one == other == Construction(kwargs={"a": 2, "b": "x"})
    assert not bind("C", parameters, Construction((1,), {"b": "x"}))
