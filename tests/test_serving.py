"""The inside of a container: hooks around inputs, methods of both kinds, who runs where, and in which order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A container without its worker: the main thread serves, another one sends frames and notes what comes back.
HARNESS = """
import asyncio, json, os, signal, socket, sys, threading, time
from mesh import frames, serialization
from mesh.frames import BeginMarks, Cancel, Drop, Outcome, Start, StartFailed, Stop, Work
from mesh.output import replace_output
from mesh.protocol import Failure, Format
from mesh.serving import Serving
from mesh.usercode import UserCode
from mesh.wire import Wire

said = []
outcomes = {}

def note(text):
    said.append(text)

def where():
    try:
        asyncio.get_running_loop()
        loop = "loop"
    except RuntimeError:
        loop = "no loop"
    return f"{'main' if threading.current_thread() is threading.main_thread() else 'thread'}, {loop}"

class Worker(threading.Thread):
    def __init__(self, limit, works, stop):
        super().__init__(daemon=True)
        self.ours, theirs = socket.socketpair()
        self.control, their_control = socket.socketpair()
        self.wire = Wire(theirs, their_control)
        page = BeginMarks.memfd(limit)
        self.marks = BeginMarks(page)
        self.works, self.stopping = works, stop
        self.start_frame = Start("a", "f", "1", "main", "w", "c", {}, {}, "", 1 << 20, limit)

    def send(self, *sent):
        self.ours.sendall(b"".join(frames.encode(frame) for frame in sent))

    def cancel(self, seq):
        self.control.sendall(frames.encode(Cancel(seq, False)))
        os.kill(os.getpid(), signal.SIGUSR1)

    def run(self):
        for seq, (method, args) in enumerate(self.works, 1):
            format, body = serialization.encode_arguments(args, {})
            self.send(Work(seq, f"fc-{seq}", 0, 1, "", format, body, True, method))
        if self.stopping:
            self.send(Stop())
        buffer = frames.Buffer()
        while data := self.ours.recv(1 << 16):
            for frame in buffer.feed(data):
                if isinstance(frame, Outcome):
                    value = serialization.decode(Format(frame.format), frame.body) if frame.state == "succeeded" else (
                        Failure.decode(frame.body).summary if frame.body else "")
                    outcomes[frame.seq] = [str(frame.state), value]
                    note(f"outcome {frame.seq}")
                    self.on_outcome(frame.seq)
                elif isinstance(frame, frames.Log):
                    logs.append([frame.seq, frame.text])

    def on_outcome(self, seq): ...

logs = []

def serve(code, works=(), limit=1, stop=True, worker_class=Worker):
    worker = worker_class(limit, list(works), stop)
    outputs = replace_output(worker.wire)
    serving = Serving(worker.wire, worker.start_frame, code, outputs, worker.marks)
    serving.prepare()
    note("ready")
    worker.start()
    serving.serve()
    note("served")
    for output in outputs:
        output.end(0)
    worker.wire.protocol.shutdown(socket.SHUT_RDWR)
    worker.join()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__

def report():
    sys.__stdout__.write(json.dumps({"said": said, "outcomes": outcomes, "logs": logs}))
    sys.__stdout__.flush()
    os._exit(0)
"""


def run(body: str) -> Any:
    """What the harness reports after this program."""
    done = subprocess.run(
        [sys.executable, "-c", HARNESS + textwrap.dedent(body) + "\nreport()\n"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_hooks_run_before_the_first_input_and_after_the_last_in_their_order() -> None:
    report = run("""
        async def opens():
            note(f"enter 2: {where()}")
        code = UserCode(
            functions={"ask": lambda x: note(f"ask {x}: {where()}")},
            enter=[lambda: note(f"enter 1: {where()}"), opens],
            exit=[lambda: note("exit 1"), lambda: note("exit 2")],
        )
        serve(code, [("ask", (1,)), ("ask", (2,))])
    """)
    assert [text for text in report["said"] if not text.startswith("outcome")] == [
        "enter 1: main, no loop",
        "enter 2: main, loop",
        "ready",
        "ask 1: main, no loop",
        "ask 2: main, no loop",
        "exit 1",
        "exit 2",
        "served",
    ]


def test_what_an_async_hook_opens_belongs_to_the_loop_that_serves() -> None:
    """A task that it starts goes on between inputs, and a lock that it made can be waited for."""
    report = run("""
        async def opens():
            global loop, ticks, ticking
            loop, ticks = asyncio.get_running_loop(), 0
            async def tick():
                global ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0.001)
            ticking = asyncio.create_task(tick())
        async def ask(x):
            before = ticks
            while ticks < before + 3:
                await asyncio.sleep(0.001)
            return loop is asyncio.get_running_loop()
        async def closes():
            ticking.cancel()
            note(f"closed in the same loop: {loop is asyncio.get_running_loop()}")
        serve(UserCode(functions={"ask": ask}, enter=[opens], exit=[closes]), [("ask", (1,)), ("ask", (2,))])
    """)
    assert report["outcomes"] == {"1": ["succeeded", True], "2": ["succeeded", True]}
    assert "closed in the same loop: True" in report["said"]


def test_an_exit_hook_that_fails_is_told_and_the_others_run() -> None:
    report = run("""
        def bad():
            raise ValueError("will not close")
        def leaves():
            raise SystemExit(3)
        serve(UserCode(functions={"": lambda: 1}, exit=[bad, leaves, lambda: note("exit 3")]), [("", ())])
    """)
    assert [text for text in report["said"] if text != "outcome 1"] == ["ready", "exit 3", "served"]
    text = "".join(text for seq, text in report["logs"] if seq == 0)
    assert "the exit hook bad failed" in text
    assert "ValueError: will not close" in text
    assert "the exit hook leaves failed" in text


def test_an_enter_hook_that_fails_is_raised_before_anything_is_served() -> None:
    report = run("""
        async def bad():
            raise ValueError("no model")
        try:
            serve(UserCode(functions={"": lambda: 1}, enter=[bad], exit=[lambda: note("exit")]))
        except ValueError as error:
            note(str(error))
    """)
    assert report["said"] == ["no model"]


@pytest.mark.parametrize(("limit", "sync"), [(1, "main, no loop"), (4, "thread, no loop")])
def test_a_class_has_methods_of_both_kinds(limit: int, sync: str) -> None:
    report = run(f"""
        async def later(x):
            await asyncio.sleep(0)
            return where()
        functions = {{"now": lambda x: where(), "later": later}}
        serve(UserCode(functions=functions), [("now", (1,)), ("later", (2,)), ("now", (3,)), ("later", (4,))], {limit})
    """)
    assert {seq: value for seq, (_, value) in report["outcomes"].items()} == {
        "1": sync,
        "2": "main, loop",
        "3": sync,
        "4": "main, loop",
    }


def test_what_runs_when_the_worker_says_stop_is_finished() -> None:
    for kind in ("def", "async def"):
        report = run(f"""
            {kind} slow(x):
                time.sleep(0.2)
                return x
            serve(UserCode(functions={{"": slow}}, exit=[lambda: note("exit")]), [("", (n,)) for n in range(4)], 4)
        """)
        assert report["outcomes"] == {str(n + 1): ["succeeded", n] for n in range(4)}
        assert report["said"].index("exit") > report["said"].index("ready")


def test_an_interrupt_never_hits_what_its_thread_runs_next() -> None:
    """Inputs end at the moment they are cancelled, again and again: those that were not named all succeed."""
    report = run("""
        class Canceller(Worker):
            def on_outcome(self, seq):
                begin = seq + 3
                if begin % 2 == 0 and begin <= len(self.works):
                    self.cancel(begin)
                if len(outcomes) == len(self.works):
                    self.send(Stop())
        def short(x):
            for _ in range(200):
                pass
            return x
        works = [("", (n,)) for n in range(1, 3001)]
        serve(UserCode(functions={"": short}), works, limit=4, stop=False, worker_class=Canceller)
    """)
    states = {int(seq): state for seq, (state, _) in report["outcomes"].items()}
    assert len(states) == 3000
    assert {states[seq] for seq in states if seq % 2} == {"succeeded"}
    assert {states[seq] for seq in states if seq % 2 == 0} <= {"succeeded", "cancelled"}
    assert "cancelled" in states.values()


def test_context_variables_set_by_a_hook_are_seen_by_inputs_in_threads() -> None:
    report = run("""
        import contextvars
        model = contextvars.ContextVar("model", default="none")
        serve(UserCode(functions={"": lambda: model.get()}, enter=[lambda: model.set("loaded")]), [("", ())], 2)
    """)
    assert report["outcomes"] == {"1": ["succeeded", "loaded"]}


# --- what is not an input's own thread -------------------------------------------------------------------------------


def test_a_thread_of_the_users_prints_for_the_input_that_runs_alone() -> None:
    report = run("""
        def prints(name):
            thread = threading.Thread(target=lambda: print(f"a thread of {name}"))
            thread.start()
            thread.join()
        serve(UserCode(functions={"": prints}), [("", ("one",)), ("", ("two",))])
    """)
    assert sorted({(seq, text) for seq, text in map(tuple, report["logs"])}) == [
        (1, "a thread of one\n"),
        (2, "a thread of two\n"),
    ]


def test_where_several_run_it_prints_for_the_container_alone() -> None:
    report = run("""
        barrier = threading.Barrier(2)
        def prints(name):
            barrier.wait(10)
            thread = threading.Thread(target=lambda: print(f"a thread of {name}"))
            thread.start()
            thread.join()
            print(f"printed by {name}")
            barrier.wait(10)
        serve(UserCode(functions={"": prints}), [("", ("one",)), ("", ("two",))], 2)
    """)
    by_input = {(seq, line) for seq, text in report["logs"] for line in text.splitlines()}
    assert by_input == {(0, "a thread of one"), (0, "a thread of two"), (1, "printed by one"), (2, "printed by two")}


def test_a_function_that_forks_in_a_thread_answers_once() -> None:
    report = run("""
        def forks(x):
            child = os.fork()
            if child:
                os.waitpid(child, 0)
            return "parent" if child else "child"
        serve(UserCode(functions={"": forks}), [("", (n,)) for n in range(6)], 3)
    """)
    assert report["outcomes"] == {str(n): ["succeeded", "parent"] for n in range(1, 7)}


def test_a_forked_process_prints_and_goes_on() -> None:
    """As `multiprocessing` has it: what it prints goes past the frames, where a subprocess's output goes."""
    report = run("""
        import multiprocessing
        def half(x):
            os.dup2(quiet, 1)  # the harness reports there
            print(f"half of {x}", flush=True)
            return x / 2
        def shares(x):
            with multiprocessing.get_context("fork").Pool(2) as pool:
                return sum(pool.map(half, range(x)))
        quiet = os.open(os.devnull, os.O_WRONLY)
        serve(UserCode(functions={"": shares}), [("", (5,))])
    """)
    assert report["outcomes"] == {"1": ["succeeded", 5.0]}
