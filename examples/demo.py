"""What `python3 dev demo` shows: a function deployed to an embedded NATS server, picked up by a worker, called from
another process, and its result read back. Uses free ports; keeps its data in the checkout, and removes it at the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "examples" / "word_count.py"

CALLER = """
import mesh

count_words = mesh.Function.from_name("word-count", "count_words")
call = count_words.spawn("to be or not to be")
print("spawned", call.object_id)
print("result ", mesh.FunctionCall.from_id(call.object_id).get(timeout=20))
print("retried", mesh.Function.from_name("word-count", "unlucky").remote())
"""


def environment(folder: Path) -> dict[str, str]:
    """Everything a mesh keeps, in one folder."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MESH_")}
    places = {f"MESH_{kind}_DIR": str(folder / kind.lower()) for kind in ("DATA", "CACHE", "STATE")}
    return {**clean, **places, "HOME": str(folder), "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def follow(process: subprocess.Popen[str], ready: threading.Event) -> None:
    """Show what the mesh says, indented."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"    {line}", end="", flush=True)
        if "Ctrl-C ends it" in line:
            ready.set()


def step(text: str, *command: str, env: dict[str, str]) -> None:
    """Run a command of the demo, and show it."""
    say(text)
    subprocess.run([sys.executable, *command], cwd=ROOT, env=env, check=True, timeout=60, stderr=sys.stdout)


def main() -> int:
    (ROOT / ".dev").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir=ROOT / ".dev"))
    env = environment(folder)
    say("$ mesh up                              # a NATS server with JetStream, and a worker")
    up = subprocess.Popen(
        [sys.executable, "-m", "mesh", "up", "--port", "0"],
        cwd=ROOT,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    ready = threading.Event()
    reader = threading.Thread(target=follow, args=(up, ready))
    reader.start()
    try:
        if not ready.wait(45):
            raise SystemExit("the mesh did not come up")
        step("$ mesh deploy examples/word_count.py", "-m", "mesh", "deploy", str(APP), env=env)
        step("$ python caller.py                     # another process: spawn, then get by id", "-c", CALLER, env=env)
        time.sleep(0.2)  # so that the worker's last line stands before what follows
        step("$ mesh call list", "-m", "mesh", "call", "list", env=env)
    finally:
        say("Ctrl-C")
        up.send_signal(signal.SIGINT)
        try:
            up.wait(20)
        except subprocess.TimeoutExpired:
            up.kill()
        reader.join(5)
        shutil.rmtree(folder, ignore_errors=True)
    say("That was a whole mesh. README.md says how to use one.")
    return up.returncode


if __name__ == "__main__":
    sys.exit(main())
