"""Images as users write them: environments of their own for functions. Immutable; each method returns another image."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from mesh import context, localfiles
from mesh.exception import InvalidError, UnimplementedError
from mesh.imagespec import ImageSpec, Step, inside
from mesh.localfiles import Ignore
from mesh.secretref import check_env

P = ParamSpec("P")

_PYTHON = re.compile(r"3\.(1[1-9]|[2-9]\d)(\.\d+)?")


def _flat(names: Sequence[object]) -> list[str]:
    """What Modal takes: strings, and lists of strings."""
    flat: list[str] = []
    for name in names:
        if isinstance(name, str):
            flat.append(name)
        elif isinstance(name, (list, tuple)):
            flat += _flat(name)
        else:
            raise InvalidError(f"an image is described by strings, and {name!r} is none")
    return flat


def _refused(name: str) -> Any:
    """A method that mesh does not have: it can be written, and what uses it cannot be deployed."""

    def method(self: Image, *args: Any, **options: Any) -> Image:
        return self._with(Step.REFUSED, f"Image.{name}")

    return method


def _refused_beginning(name: str) -> Any:
    """The same of a method that begins an image."""

    def begin(*args: Any, **options: Any) -> Image:
        return Image(ImageSpec())._with(Step.REFUSED, f"Image.{name}")

    return staticmethod(begin)


class Image:
    """An environment for functions: a Python with packages of its own, and what else their containers find.

    Each distinct one is built when a worker first needs it, there, by uv, as a virtual environment, and is shared by
    all functions that have the same. It is no Linux system of its own: containers stay processes of the worker's.
    Functions without an image have the worker's own environment.
    """

    def __init__(self, spec: ImageSpec) -> None:
        """Not for users: `Image.debian_slim()` begins an image."""
        self.spec = spec

    def _with(self, step: Step, value: Any, said: object = None) -> Image:
        """`said`: what tells the step from others wherever it is described; its value, unless that was read."""
        words = json.dumps([self.spec.mark, step, value if said is None else said], sort_keys=True)
        mark = hashlib.sha256(words.encode()).hexdigest()[:16]
        return Image(ImageSpec(self.spec.python, (*self.spec.steps, (step, value)), mark))

    @staticmethod
    def debian_slim(python_version: str | None = None, force_build: bool = False) -> Image:
        """Begin an image: a Python, and no packages but mesh and what it needs.

        Args:
            python_version: such as "3.12", of which the minor version counts, 3.11 at least. A worker without it does
                not run the function. By default the worker's own.
            force_build: exists for code written for Modal.

        Raises:
            InvalidError: a version that mesh does not run on, or none at all.
        """
        if python_version is None:
            return Image(ImageSpec(mark="python"))
        if not _PYTHON.fullmatch(python_version):
            raise InvalidError(f'python_version must be 3.11 or newer, such as "3.12", not {python_version!r}')
        minor = ".".join(python_version.split(".")[:2])
        return Image(ImageSpec(minor, mark=f"python {minor}"))

    # --- packages ----------------------------------------------------------------------------------------------------

    def pip_install(
        self,
        *packages: str | list[str],
        find_links: str | None = None,
        index_url: str | None = None,
        extra_index_url: str | None = None,
        pre: bool = False,
        extra_options: str = "",
        force_build: bool = False,
        gpu: object = None,
        secrets: Sequence[object] = (),
    ) -> Image:
        """Install packages, named as pip takes them: "numpy", "numpy==2.4.1", "numpy>=2", a URL.

        What uv has on the worker already is taken where it satisfies that; else the index is asked that the worker's
        pip or uv is set up for. Pin what must not differ from worker to worker.

        Args:
            find_links: a URL, or a directory of the worker, with packages. index_url, extra_index_url: another index,
                or one more. pre: also versions that are not released. extra_options: of `uv pip install`.
            force_build, gpu: exist for code written for Modal. secrets: not built; the image cannot be deployed.
        """
        options = {"--find-links": find_links, "--default-index": index_url, "--index": extra_index_url}
        words = [word for name, value in options.items() if value for word in (name, value)]
        words += ["--prerelease", "allow"] if pre else []
        image = self._with(Step.PIP, [*words, *shlex.split(extra_options), *_flat(packages)])
        return image._with(Step.REFUSED, "secrets= of Image.pip_install") if secrets else image

    def uv_pip_install(
        self,
        *packages: str | list[str],
        requirements: Sequence[str] = (),
        uv_version: str | None = None,
        **options: Any,
    ) -> Image:
        """As `pip_install`.

        Args:
            requirements: files whose packages are installed, too. uv_version: exists for code written for Modal.
        """
        image = self
        for file in requirements:
            image = image.pip_install_from_requirements(file, **options)
        return image.pip_install(*packages, **options) if packages else image

    def pip_install_from_requirements(self, requirements_txt: str, **options: Any) -> Image:
        """Install what a requirements file lists. It is read here and now, so it need not be on the worker.

        Args:
            options: those of `pip_install`.

        Raises:
            InvalidError: it has an option, such as `-r other.txt`; those are arguments of this method.
        """
        path = Path(requirements_txt).expanduser()
        return self._of_file(path, _read_requirements, options)

    def pip_install_from_pyproject(
        self, pyproject_toml: str, optional_dependencies: Sequence[str] = (), **options: Any
    ) -> Image:
        """Install the dependencies of a project, which are read here and now.

        Args:
            optional_dependencies: names of groups of its `optional-dependencies`. options: those of `pip_install`.

        Raises:
            InvalidError: there is no such group.
        """

        def read(path: Path) -> list[str]:
            return _read_dependencies(path, optional_dependencies)

        return self._of_file(Path(pyproject_toml).expanduser(), read, options, sorted(optional_dependencies))

    def _of_file(
        self, path: Path, read: Callable[[Path], list[str]], options: Mapping[str, Any], more: object = None
    ) -> Image:
        """Packages that a file names. Containers describe the image, too, and do not have the file."""
        packages = read(path) if context.is_local() else []
        described = Image(ImageSpec()).pip_install(packages, **options).spec
        said = [path.name, more, Image(ImageSpec()).pip_install(**options).spec.steps]
        image = self
        for step, value in described.steps:
            image = image._with(step, value, said)
        return image

    def uv_sync(
        self,
        uv_project_dir: str = "./",
        *,
        groups: Sequence[str] = (),
        extras: Sequence[str] = (),
        frozen: bool = True,
        extra_options: str = "",
        uv_version: str | None = None,
        force_build: bool = False,
        gpu: object = None,
    ) -> Image:
        """Install what a project of uv's has locked, without the project itself.

        Its `pyproject.toml` and `uv.lock` are read here and now.

        Args:
            groups, extras: which of its dependency groups and optional dependencies, too.
            frozen: take the lock file as it is, also if it does not fit the project any more.
            extra_options: of `uv sync`. uv_version, force_build, gpu: exist for code written for Modal.

        Raises:
            NotFoundError: there is no such project, or no lock file: `uv lock` makes it.
        """
        words = [*(f"--group={name}" for name in groups), *(f"--extra={name}" for name in extras)]
        words += ["--frozen" if frozen else "--locked", *shlex.split(extra_options)]
        folder = Path(uv_project_dir)
        names = ("pyproject.toml", "uv.lock") if context.is_local() else ()
        value = {"files": [localfiles.read(folder / name, name) for name in names], "words": words}
        return self._with(Step.SYNC, value, [folder.name, words])

    def apt_install(self, *packages: str | list[str], force_build: bool = False) -> Image:
        """Debian packages that the worker's system must have.

        Where one is missing, a worker installs it if its setting `apt_install` allows that; else the function's calls
        wait for a worker that has it, and say which is missing.
        """
        return self._with(Step.APT, _flat(packages))

    # --- what is run -------------------------------------------------------------------------------------------------

    def run_commands(self, *commands: str | list[str], force_build: bool = False, gpu: object = None) -> Image:
        """Run shell commands when the image is built, as the worker's user, with its Python first on the PATH.

        All of an image begin in one directory, empty at first and gone afterwards. `pip` is uv's, for this environment.
        """
        return self._with(Step.RUN, _flat(commands))

    # --- files -------------------------------------------------------------------------------------------------------

    def add_local_file(self, local_path: str | Path, remote_path: str, *, copy: bool = False) -> Image:
        """Put a file into its containers. It is read here and now, and travels with the app.

        Args:
            remote_path: where it is found: a path relative to where containers begin. One that ends with a slash is
                that of a directory, in which the file keeps its name. Containers have no root of their own: `/root` is
                where they begin, and a leading slash is ignored elsewhere.
            copy: exists for code written for Modal.

        Raises:
            NotFoundError: there is no such file. RequestSizeError: it has more than 100 MiB.
        """
        path = Path(local_path)
        at = f"{remote_path}{path.name}" if remote_path.endswith("/") else remote_path
        return self._with_files(path, at, ())

    def add_local_dir(
        self, local_path: str | Path, remote_path: str, *, copy: bool = False, ignore: Ignore = ()
    ) -> Image:
        """Put all files of a directory into its containers. They are read here and now, and travel with the app.

        `mesh serve` runs the app anew when one of them changes.

        Args:
            remote_path: the directory they are found in, as for `add_local_file`.
            copy: exists for code written for Modal. ignore: patterns such as `"*.tmp"`, or a function of a path
                relative to the directory, which says what stays here.

        Raises:
            NotFoundError: there is no such directory. InvalidError: it has no files. RequestSizeError: they have more
                than 100 MiB.
        """
        return self._with_files(Path(local_path), remote_path, ignore)

    def _with_files(self, path: Path, at: str, ignore: Ignore) -> Image:
        digest = localfiles.read(path, inside(at), ignore) if context.is_local() else ""
        return self._with(Step.FILES, digest, [path.name, at])

    def add_local_python_source(self, *modules: str, copy: bool = False, ignore: Ignore = ()) -> Image:
        """Have modules of yours travel with the app although it does not import them by name. What it imports does.

        Args:
            modules: names of modules or packages that can be imported here.
            copy, ignore: exist for code written for Modal.
        """
        return self._with(Step.SOURCE, _flat(modules))

    # --- what else containers find -----------------------------------------------------------------------------------

    def env(self, vars: Mapping[str, str]) -> Image:
        """Set variables in its containers, and in the steps of its building that follow.

        They are stored as they are: what nobody may read belongs into a secret.
        """
        check_env(vars, "Image.env")
        return self._with(Step.ENV, dict(vars))

    def workdir(self, path: str) -> Image:
        """Where its containers begin: a directory below their own, which is made; not one of the worker's system."""
        return self._with(Step.WORKDIR, str(path))

    def pipe(self, func: Callable[Concatenate[Image, P], Image], *args: P.args, **kwargs: P.kwargs) -> Image:
        """What a function makes of it: `image.pipe(f, 1)` is `f(image, 1)`."""
        return func(self, *args, **kwargs)

    @contextlib.contextmanager
    def imports(self) -> Generator[None]:
        """For imports of packages that only the image has: one that fails raises in containers of this image alone."""
        try:
            yield
        except ImportError:
            running = context.container()
            if running is not None and running.image == self.spec.mark:
                raise

    def __repr__(self) -> str:
        steps = ", ".join(f"{kind} {value}" for kind, value in self.spec.steps)
        return f"mesh.Image(Python {self.spec.python or 'of the worker'}{f': {steps}' if steps else ''})"

    # --- what only systems of their own could have -------------------------------------------------------------------

    from_registry = _refused_beginning("from_registry")
    from_dockerfile = _refused_beginning("from_dockerfile")
    from_scratch = _refused_beginning("from_scratch")
    from_aws_ecr = _refused_beginning("from_aws_ecr")
    from_gcp_artifact_registry = _refused_beginning("from_gcp_artifact_registry")
    from_id = _refused_beginning("from_id")
    micromamba = _refused_beginning("micromamba")
    dockerfile_commands = _refused("dockerfile_commands")
    micromamba_install = _refused("micromamba_install")
    entrypoint = _refused("entrypoint")
    cmd = _refused("cmd")
    shell = _refused("shell")
    run_function = _refused("run_function")
    poetry_install_from_file = _refused("poetry_install_from_file")
    pip_install_private_repos = _refused("pip_install_private_repos")


def _read_requirements(path: Path) -> list[str]:
    lines = [re.split(r"(^|\s)#", line)[0].strip() for line in _read(path).replace("\\\n", "").splitlines()]
    for line in lines:
        if line.startswith("-"):
            raise InvalidError(
                f"{path}: {line!r} is an option, which is not taken from the file: pass it to "
                "pip_install_from_requirements (find_links=, index_url=, extra_index_url=, extra_options=)"
            )
    return [line for line in lines if line]


def _read_dependencies(path: Path, groups: Sequence[str]) -> list[str]:
    project = tomllib.loads(_read(path)).get("project", {})
    extras: dict[str, list[str]] = project.get("optional-dependencies", {})
    for name in groups:
        if name not in extras:
            has = ", ".join(extras) or "none"
            raise InvalidError(f"{path} has no optional dependencies {name!r}; it has {has}")
    return [*project.get("dependencies", ()), *(line for name in groups for line in extras[name])]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise InvalidError(f"{path.absolute()} cannot be read: {error.strerror}") from None


def check(spec: ImageSpec, function: str, *, by_value: bool) -> None:
    """Refuse an image with which a function cannot be deployed.

    Raises:
        UnimplementedError: it has steps that mesh does not have.
        InvalidError: it has another Python than the function's code, which goes by value.
    """
    steps = spec.of(Step.REFUSED)
    if steps:
        raise UnimplementedError(
            f"the image of {function!r} uses {', '.join(dict.fromkeys(steps))}, which mesh does not have: an image is "
            "a Python environment on the worker's own system"
        )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if by_value and spec.python not in ("", python):
        raise InvalidError(
            f"{function!r} goes by value from Python {python} and cannot run on the Python {spec.python} of its image; "
            "move it to a module, or leave python_version out"
        )
