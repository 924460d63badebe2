"""Building an image's environment, step by step, by uv."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mesh import programs, pythons
from mesh.exception import ImageBuildError
from mesh.imagespec import ImageSpec, Step
from mesh.vault import NotHere

_LAST_LINES = 20  # of what a program printed, in the error
_OF_CONTAINERS = (  # what mesh needs there, for some functions at least
    *("nats-py", "cloudpickle", "msgpack", "a2wsgi", "python-dotenv", "tzdata"),
    *("httpcore", "h11", "certifi", "anyio", "idna", "typing_extensions", "websockets"),
)
_PROOF = "import mesh.zygote, mesh.app, mesh.broker, mesh.client, mesh.map"  # that containers will find all of it

Fetch = Callable[[Sequence[str]], Awaitable[Sequence[Path]]]


class Build:
    """One build of an environment.

    Args:
        target: where it is made; nothing is there yet. runtime: the directory with mesh, as `link_runtime` made it.
        fetch: gives directories of files by their digests. say: told what is being done.
    """

    def __init__(self, image: ImageSpec, target: Path, runtime: Path, fetch: Fetch, say: Callable[[str], None]) -> None:
        self._image = image
        self._target = target
        self._runtime = runtime
        self._fetch = fetch
        self._say = say
        self._variables: dict[str, str] = {}

    async def run(self) -> None:
        """Do it.

        Raises:
            ImageBuildError: a step failed. NotHere: this machine lacks the Python.
        """
        image = self._image
        python = await pythons.find(image.python)
        if not python:
            raise NotHere(f"its image needs Python {image.python}, which this worker does not have")
        self._say(f"Python {image.python or pythons.OWN}")
        await self._uv(
            f"making an environment of {python}", "venv", "--relocatable", "--python", python, str(self._target)
        )
        (site,) = (self._target / "lib").glob("python3.*/site-packages")
        (site / "zz_mesh.pth").write_text(f"{self._runtime}\n")  # it appends: what the image installs goes first
        with tempfile.TemporaryDirectory(prefix="mesh-build-") as folder:
            for kind, value in image.building:
                await self._step(kind, value, Path(folder))
        proof = [str(self._target / "bin" / "python"), "-P", "-c", _PROOF]
        await self._run("importing mesh beside what it installs", proof, self._inside())

    async def _step(self, kind: Step, value: Any, folder: Path) -> None:
        if kind is Step.ENV:
            self._variables |= value
        elif kind is Step.PIP:
            await self._install(value)
        elif kind is Step.SYNC:
            await self._sync(await self._fetch(value["files"]), value["words"], folder / "project")
        else:
            for command in value:
                self._say(command)
                await self._run(command, ["/bin/sh", "-c", command], self._inside(_pip(folder / "bin")), folder)

    async def _install(self, words: Sequence[str]) -> None:
        python = str(self._target / "bin" / "python")
        await self._uv_of_cache(f"pip install {' '.join(words)}", "pip", "install", "--python", python, *words)

    async def _sync(self, project: Sequence[Path], words: Sequence[str], folder: Path) -> None:
        for part in project:
            shutil.copytree(part, folder, dirs_exist_ok=True)
        python = str(self._target / "bin" / "python")
        options = ("--no-install-workspace", "--inexact", "--python", python, "--project", str(folder))
        await self._uv_of_cache(f"uv sync {' '.join(words)}", "sync", *options, *words)

    async def _uv_of_cache(self, step: str, *arguments: str) -> None:
        """From what uv has already where that is enough: it takes a tenth of the time, and no index."""
        self._say(step)
        try:
            await self._uv(step, *arguments, "--compile-bytecode", "--offline")
        except ImageBuildError:
            await self._uv(step, *arguments, "--compile-bytecode")

    async def _uv(self, step: str, *arguments: str) -> None:
        own = {**programs.variables(), "UV_PROJECT_ENVIRONMENT": str(self._target)}
        await self._run(step, [pythons.uv(), "--quiet", *arguments], {**own, **self._variables})

    def _inside(self, *first: Path) -> dict[str, str]:
        path = os.pathsep.join(map(str, [*first, self._target / "bin", os.environ.get("PATH", os.defpath)]))
        return {**programs.variables(), **self._variables, "PATH": path, "VIRTUAL_ENV": str(self._target)}

    async def _run(
        self, step: str, command: Sequence[str], variables: Mapping[str, str], cwd: str | Path = "/"
    ) -> None:
        code, output = await programs.run(command, variables, cwd)
        if code:
            last = output.splitlines()[-_LAST_LINES:]
            raise ImageBuildError("\n".join([f"{step} failed, with {code}:", *last]), f"im-{self._image.digest[:12]}")


def _pip(folder: Path) -> Path:
    """A directory with a `pip` that is uv's: environments by uv have none, and no other must be found in its place."""
    folder.mkdir(exist_ok=True)
    for name in ("pip", "pip3"):
        (folder / name).write_text(f'#!/bin/sh\nexec "{pythons.uv()}" pip "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def link_runtime(folder: Path) -> Path:
    """A directory with the worker's own mesh and what containers need of its packages, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, place in runtime().items():
        link = folder / name
        if not link.is_symlink():
            fresh = folder / f".{name}.{os.getpid()}"
            fresh.symlink_to(place)
            fresh.replace(link)
    return folder


def runtime() -> dict[str, Path]:
    """What is in it, by its name there."""
    found = {"mesh": Path(__file__).resolve().parent}
    for name in _OF_CONTAINERS:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # newer Pythons need no typing_extensions
        for file in distribution.files or ():
            top = file.parts[0]
            if top != ".." and not top.endswith((".dist-info", "__pycache__")):
                found[top] = Path(str(distribution.locate_file(top))).resolve()
    return found
