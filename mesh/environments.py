"""The images on this machine: each environment built once, under a lock; kept while it is used, and some time longer.

An environment is `<cache>/env/<digest>`: a virtual environment made under another name, and renamed when it is whole.
Its digest is over the image's steps and this worker's installation of mesh, which every environment refers to.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mesh import debian, envcache, imagebuild, pythons
from mesh.background import Background
from mesh.config import Settings
from mesh.envcache import Hold
from mesh.exception import ConnectionError, DataLossError, Error, ImageBuildError, NotFoundError
from mesh.imagespec import ImageSpec, Step, inside
from mesh.vault import NotHere

logger = logging.getLogger("mesh.worker")

_AT_ONCE = 4  # builds
_LONGEST_BUILD = 3600.0  # seconds
_FIRST_PAUSE, _LONGEST_PAUSE = 15.0, 600.0  # seconds until a build that failed is tried again
_KEPT = 600.0  # seconds that an environment without containers counts as used
_LOCK_PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class Built:
    """An image as it stands on this machine: what containers are started with.

    Attributes:
        files: directories whose content each container gets a copy of in its own.
    """

    interpreter: str
    variables: Mapping[str, str]
    workdir: str
    files: Sequence[Path] = ()

    def furnish(self, directory: Path) -> Path:
        """Put a copy of the files into a container's directory; returns where it begins."""
        for folder in self.files:
            shutil.copytree(folder, directory, dirs_exist_ok=True)
        begin = directory / inside(self.workdir)
        begin.mkdir(parents=True, exist_ok=True)
        return begin


@dataclass(frozen=True, slots=True)
class _Failed:
    error: ImageBuildError
    at: float
    pause: float


class Environments:
    """What this worker builds and uses.

    Args:
        fetch: gives the directories of files that an app's images bring, by their digests.
    """

    def __init__(self, settings: Settings, fetch: Callable[[str, Sequence[str]], Awaitable[Sequence[Path]]]) -> None:
        self._directory = settings.cache_dir / "env"
        self._runtimes = settings.cache_dir / "runtime"
        self._may_install = settings.apt_install
        self._limit = settings.images_size
        self._fetch = fetch
        self._holds: dict[Path, Hold] = {}
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._builds: dict[str, asyncio.Task[Error | None]] = {}
        self._progress: dict[str, str] = {}
        self._failed: dict[str, _Failed] = {}
        self._packages: set[str] = set()  # of Debian, that are here
        self._background = Background()

    def built(self, image: ImageSpec) -> Built | None:
        """An image that is ready; `None` if it must be prepared first."""
        target = self._target(image)
        python = target / "bin" / "python"
        if not self._packages.issuperset(image.packages) or not python.exists():  # its Python may have been removed
            return None
        path = f"{target / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        own = {"VIRTUAL_ENV": str(target), "PATH": path, "PYTHONPATH": ""}  # the worker's would go before the image's
        return Built(str(python), {**own, **image.env}, image.workdir)

    async def use(self, image: ImageSpec, app: str) -> Built:
        """An image that was ready, for a container that is started now.

        Raises:
            NotHere: it is no longer. NotFoundError, DataLossError, ConnectionError: its files cannot be had.
        """
        target = self._target(image)
        if target in self._holds:
            self._holds[target].renew()
        elif target.exists():
            self._holds[target] = Hold(target)
        built = self.built(image)
        if built is None:
            raise NotHere("its image has just been removed")
        return replace(built, files=await self._fetch(app, image.files))

    async def tidy(self, interpreters: Collection[str]) -> None:
        """Let go of environments that nothing here uses, and remove what is too much on this machine.

        Args:
            interpreters: those in use.
        """
        for target, hold in list(self._holds.items()):
            if str(target / "bin" / "python") not in interpreters and time.time() - hold.renewed > _KEPT:
                self._holds.pop(target).end()
        for name in await asyncio.to_thread(envcache.tidy, self._directory, self._limit):
            logger.info("environment %s is removed: it was not used", name)

    async def prepare(self, image: ImageSpec, app: str) -> None:
        """See that an image is ready, for the app that has its files. Whoever stops waiting leaves its build going on.

        Raises:
            ImageBuildError: it cannot be built, now or for some time. NotHere: this machine lacks something for it.
        """
        unknown = image.of(Step.REFUSED)
        if unknown:
            raise NotHere(f"its image has what this worker's mesh does not have: {', '.join(unknown)}")
        key = self._key(image)
        if key not in self._builds:
            build = self._builds[key] = self._background.spawn(self._prepare(image, app))
            build.add_done_callback(lambda _: self._builds.pop(key))
        error = await asyncio.shield(self._builds[key])
        if error is not None:
            raise error

    def progress(self, image: ImageSpec) -> str:
        """What is being done for an image that is being prepared."""
        return self._progress.get(self._key(image), "it waits for other builds")

    def forget(self, image: ImageSpec) -> None:
        """Try it again even if it failed: it was deployed anew."""
        self._failed.pop(self._key(image), None)

    async def close(self) -> None:
        """End what is being built."""
        await self._background.cancel()

    # --- building ----------------------------------------------------------------------------------------------------

    def _key(self, image: ImageSpec) -> str:
        return json.dumps([image.digest, image.packages])

    @functools.cached_property
    def _installation(self) -> str:
        """What tells this worker's mesh from another's that has the same cache."""
        runtime = {name: str(place) for name, place in imagebuild.runtime().items()}
        return hashlib.sha256(json.dumps([pythons.OWN, runtime]).encode()).hexdigest()[:16]

    def _target(self, image: ImageSpec) -> Path:
        return self._directory / hashlib.sha256(f"{image.digest} {self._installation}".encode()).hexdigest()[:32]

    async def _prepare(self, image: ImageSpec, app: str) -> Error | None:
        """Returns why it is not ready."""
        key = self._key(image)
        failed = self._failed.get(key)
        if failed is not None and time.monotonic() < failed.at + failed.pause:
            return failed.error
        try:
            async with self._room, asyncio.timeout(_LONGEST_BUILD):
                await self._see_to_packages(image)
                await self._see_to_environment(image, app)
        except (NotHere, NotFoundError, DataLossError, ConnectionError) as error:
            return error  # which may be otherwise soon
        except (ImageBuildError, TimeoutError, OSError) as error:
            pause = min(2 * failed.pause, _LONGEST_PAUSE) if failed is not None else _FIRST_PAUSE
            told = error if isinstance(error, ImageBuildError) else ImageBuildError(_plain(error), _id(image))
            self._failed[key] = _Failed(told, time.monotonic(), pause)
            logger.error("image %s cannot be built: %s", _id(image), told)
            return told
        finally:
            self._progress.pop(key, None)
        self._failed.pop(key, None)
        return None

    def _say(self, image: ImageSpec, text: str) -> None:
        self._progress[self._key(image)] = text
        logger.info("image %s: %s", _id(image), text)

    async def _see_to_packages(self, image: ImageSpec) -> None:
        missing = await debian.missing(image.packages)
        names = " ".join(missing)
        if missing and not self._may_install:
            raise NotHere(
                f"its image needs the Debian packages {names}, which this worker does not have: `apt-get install "
                f"{names}` there, or let it do that by its setting apt_install (MESH_APT_INSTALL=1)"
            )
        if missing:
            async with _locked(self._directory.with_name("apt.lock")):
                self._say(image, f"apt-get install {names}")
                said = await debian.install([p for p in image.packages if p.partition("=")[0] in missing])
            if said or await debian.missing(image.packages):
                raise ImageBuildError(f"apt-get install {names} failed:\n{said}", _id(image))
        self._packages.update(image.packages)

    async def _see_to_environment(self, image: ImageSpec, app: str) -> None:
        target = self._target(image)
        async with _locked(target.with_suffix(".lock")):
            if (target / "bin" / "python").exists():
                return
            began = time.monotonic()
            fresh = target.with_name(f"{target.name}.tmp-{os.getpid()}")
            await asyncio.to_thread(_remove, target, fresh)
            runtime = imagebuild.link_runtime(self._runtimes / self._installation)
            try:
                fetch, say = functools.partial(self._fetch, app), functools.partial(self._say, image)
                await imagebuild.Build(image, fresh, runtime, fetch, say).run()
                await asyncio.to_thread(envcache.note_size, fresh, target)
                fresh.rename(target)
            finally:
                await asyncio.to_thread(_remove, fresh)
            logger.info("image %s is built, in %.1f s", _id(image), time.monotonic() - began)


def _id(image: ImageSpec) -> str:
    return f"im-{image.digest[:12]}"


def _plain(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"it was not built within {_LONGEST_BUILD:g} s"
    return f"{type(error).__name__}: {error}"


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def _locked(path: Path) -> AsyncGenerator[None]:
    """One at a time on this machine, whichever worker it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOCK_PAUSE)
        yield
