"""The life of a call, driven at random on a real server and real workers, and compared with a model after each step.

A function here does what a file tells it: return, raise, crash, or go on. So the model knows of each call whether it
can have ended, and how it must.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from mesh import FunctionCall
from mesh.broker import Broker
from mesh.exception import NotFoundError, OutputExpiredError, RemoteError
from mesh.server import NatsServer
from tests.support import Mesh, WorkerProcess, new_mesh, until

JOBS = """
    import mesh, os, signal, time
    app = mesh.App("states")
    soon = {"initial_delay": 0.1, "min_delay": 0.1, "backoff_coefficient": 1.0}

    @app.function(retries=mesh.Retries(max_retries=2, **soon), timeout=600)
    def obeys(folder, name):
        with open(f"{folder}/{name}.begun", "a") as file:
            file.write(f"{os.getpid()}\\n")
        order = f"{folder}/{name}.order"
        while not os.path.exists(order):
            time.sleep(0.01)
        word = open(order).read()
        if word != "return":
            os.unlink(order)
        if word == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "raise":
            raise ValueError(name)
        return name
"""

FINAL = {"succeeded", "failed", "cancelled"}
TRIES = 3  # the first one and two retries
BUDGET = "1000"  # containers and workers that may be lost: as many as a run can think of


@dataclass
class Model:
    """What must be true of one call.

    Attributes:
        state: how it ended, or "" while it has not. ordered: it was told to return, so it ends once somebody runs it.
        raised: tries that were told to raise. gone: its result is older than what is kept.
    """

    call: FunctionCall[str]
    name: str
    state: str = ""
    ordered: bool = False
    raised: int = 0
    gone: bool = False


class Life(RuleBasedStateMachine):
    """Random sequences of what can happen to calls."""

    calls: Bundle[Model] = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.server = NatsServer.start(self.folder / "nats", sync="2m")
        self.mesh: Mesh = self.stack.enter_context(new_mesh(self.server, self.folder, ack_wait=1))
        self.module = self.mesh.deploy(JOBS)
        self.models: list[Model] = []
        self.worker: WorkerProcess | None = None
        self.start_worker()

    def teardown(self) -> None:
        try:
            if self.worker is None:
                self.start_worker()
            for model in self.models:
                if not model.state:
                    model.ordered = True
                    self.order(model, "return")
            self.settle()
            self.check()
            until(lambda: self.mesh.ask(lambda broker: broker.calls.newest(1)) == [], what="nothing is left queued")
            assert self.letters() == {m.name for m in self.models if m.state == "failed"}
        finally:
            self.stack.close()
            self.server.kill()

    # --- what users and operators do ---------------------------------------------------------------------------------

    @rule(target=calls)
    def submit(self) -> Model:
        name = f"n{len(self.models)}"
        model = Model(self.module.obeys.spawn(str(self.folder), name), name)
        self.models.append(model)
        return model

    @rule(model=calls)
    def succeed(self, model: Model) -> None:
        if not model.state and not model.ordered:
            model.ordered = True
            self.order(model, "return")
            self.settle()

    @precondition(lambda self: self.worker is not None)
    @rule(model=calls)
    def fail(self, model: Model) -> None:
        if not model.state and not model.ordered:
            model.raised += 1
            self.order(model, "raise")
            until(lambda: not self.order_file(model).exists(), what=f"{model.name} raises")
            if model.raised == TRIES:
                self.await_end(model, "failed")

    @precondition(lambda self: self.worker is not None)
    @rule(model=calls)
    def crash(self, model: Model) -> None:
        if not model.state and not model.ordered:
            begun = self.begun(model)
            self.order(model, "crash")
            until(lambda: self.begun(model) > begun, what=f"{model.name} begins again")

    @rule(model=calls)
    def cancel(self, model: Model) -> None:
        if model.ordered and not model.state:
            return  # it may succeed at the same moment, and the model could not tell
        if model.gone:
            with pytest.raises((NotFoundError, OutputExpiredError)):
                model.call.cancel()
            return
        model.call.cancel()
        model.state = model.state or "cancelled"

    # --- what happens ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.worker is not None)
    @rule(how=st.sampled_from([signal.SIGKILL, signal.SIGTERM]))
    def lose_worker(self, how: signal.Signals) -> None:
        assert self.worker is not None
        os.kill(self.worker.pid, how)
        self.worker.process.wait(30)
        self.worker = None

    @precondition(lambda self: self.worker is None)
    @rule()
    def start_worker(self) -> None:
        # A short grace: what runs here waits for orders, and would wait until it is over.
        self.worker = self.mesh.start_worker("--containers", "16", MESH_CRASH_BUDGET=BUDGET, MESH_GRACE="0.2")
        self.settle()

    @precondition(lambda self: self.worker is not None)
    @rule()
    def pause_worker(self) -> None:
        """For longer than the ack wait: its leases lapse."""
        assert self.worker is not None
        os.kill(self.worker.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(self.worker.pid, signal.SIGCONT)

    @rule()
    def restart_server(self) -> None:
        self.server.kill()
        self.server = NatsServer.start(self.folder / "nats", port=self.server.port, sync="2m")

    @precondition(lambda self: any(m.state and not m.gone for m in self.models))
    @rule()
    def let_results_expire(self) -> None:
        async def keep(broker: Broker, seconds: float) -> None:
            stream = broker.topology.bucket_stream("results")
            config = (await broker.connection.api(f"STREAM.INFO.{stream}"))["config"]
            config.update(max_age=int(seconds * 1e9), duplicate_window=int(min(seconds, 120) * 1e9))
            await broker.connection.api(f"STREAM.UPDATE.{stream}", config)

        ended = [m for m in self.models if m.state and not m.gone]
        self.mesh.ask(lambda broker: keep(broker, 0.1))
        until(lambda: not any(self.stored(m) for m in ended), what="the results are gone")
        self.mesh.ask(lambda broker: keep(broker, 3600))
        for model in ended:
            model.gone = True

    # --- what must be true -------------------------------------------------------------------------------------------

    @invariant()
    def check(self) -> None:
        for model in self.models:
            state = self.state(model)
            if model.gone:
                assert state == "gone", f"{model.name} is {state}, and was forgotten"
            elif model.state:
                assert state == model.state, f"{model.name} is {state}, and had ended {model.state}"
                self.check_value(model)
            elif not model.ordered:
                assert state not in FINAL | {"gone"}, f"{model.name} ended {state} by itself"

    def check_value(self, model: Model) -> None:
        expected = {"failed": ValueError, "cancelled": RemoteError}.get(model.state)
        with pytest.raises(expected) if expected else contextlib.nullcontext():
            assert model.call.get(timeout=5) == model.name

    # --- how -------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """With a worker, what was told to return does."""
        if self.worker is not None:
            for model in self.models:
                if model.ordered and not model.state:
                    self.await_end(model, "succeeded")

    def await_end(self, model: Model, state: str) -> None:
        until(lambda: self.state(model) in FINAL, timeout=60, what=f"{model.name} ends")
        model.state = state

    def state(self, model: Model) -> str:
        try:
            return str(model.call.status().state)
        except (NotFoundError, OutputExpiredError):
            return "gone"

    def stored(self, model: Model) -> bool:
        return self.mesh.ask(lambda broker: broker.results.get(f"{model.call.object_id}.0")) is not None

    def letters(self) -> set[str]:
        found = json.loads(self.mesh.cli("dead", "list", "--json").stdout)["letters"]
        return {letter["error"].removeprefix("ValueError: ") for letter in found}

    def order_file(self, model: Model) -> Path:
        return self.folder / f"{model.name}.order"

    def order(self, model: Model, word: str) -> None:
        fresh = self.folder / f"{model.name}.new"
        fresh.write_text(word)
        fresh.rename(self.order_file(model))

    def begun(self, model: Model) -> int:
        path = self.folder / f"{model.name}.begun"
        return len(path.read_text().splitlines()) if path.exists() else 0


def live(examples: int, steps: int) -> None:
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],  # a failure says its steps; to shrink them takes many minutes
    )
    run_state_machine_as_test(Life, settings=settings)  # type: ignore[no-untyped-call]


def test_calls_live_as_the_model_says() -> None:
    live(examples=5, steps=15)


@pytest.mark.load
def test_calls_live_as_the_model_says_for_long() -> None:
    live(examples=60, steps=40)
