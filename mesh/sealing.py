"""Secrets' values on the wire and at rest: sealed to a public key (X25519, libsodium's sealed boxes), whose private
half is in a file that workers have, and never on the server."""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mesh.exception import DataLossError, InvalidError, NotFoundError

if TYPE_CHECKING:
    from nacl.public import PrivateKey

_HEAD = (
    "# The private key of a mesh's secrets, newest first. Keep it 0600; workers need a copy. See docs/security.md.\n"
)


def seal(public: str, value: str) -> str:
    """A value that only the holder of the private key can read."""
    from nacl.public import PublicKey, SealedBox

    return base64.b64encode(SealedBox(PublicKey(base64.b64decode(public))).encrypt(value.encode())).decode()


class Keys:
    """The private keys of a key file, the newest first."""

    def __init__(self, keys: Sequence[PrivateKey]) -> None:
        self._keys = keys

    @classmethod
    def new(cls) -> Keys:
        """A new key alone."""
        from nacl.public import PrivateKey

        return cls([PrivateKey.generate()])

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Those in a file.

        Raises:
            NotFoundError: there is no file. InvalidError: others may read it, or it holds no key.
        """
        from nacl.public import PrivateKey

        try:
            others = path.stat().st_mode & 0o077
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            raise NotFoundError(f"there is no key file {path} (setting secret_key_file)") from None
        except (OSError, ValueError) as error:
            raise InvalidError(f"the key file {path} cannot be read: {error}") from None
        if others:
            raise InvalidError(f"the key file {path} can be read by others: chmod 600 {path}")
        try:
            keys = [PrivateKey(base64.b64decode(line, validate=True)) for line in lines if line and line[0] != "#"]
        except Exception as error:  # noqa: BLE001 - the bytes may be anybody's
            raise InvalidError(f"the key file {path} holds what is no key: {type(error).__name__}") from None
        if not keys:
            raise InvalidError(f"the key file {path} holds no key")
        return cls(keys)

    def save(self, path: Path) -> None:
        """Write the file, complete or not at all, for its owner alone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(_HEAD)
            file.writelines(f"{base64.b64encode(bytes(key)).decode()}\n" for key in self._keys)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)

    def after(self, newer: Keys) -> Keys:
        """A newer key, and behind it the newest of these."""
        return Keys([*newer._keys, self._keys[0]])

    @property
    def public(self) -> str:
        """What values are sealed to: the newest one's public half."""
        return base64.b64encode(bytes(self._keys[0].public_key)).decode()

    @property
    def publics(self) -> list[str]:
        """The public half of each."""
        return [base64.b64encode(bytes(key.public_key)).decode() for key in self._keys]

    def open(self, sealed: str) -> str:
        """A value that was sealed to one of these.

        Raises:
            DataLossError: it was not.
        """
        from nacl.exceptions import CryptoError
        from nacl.public import SealedBox

        for key in self._keys:
            with contextlib.suppress(CryptoError, ValueError):
                return SealedBox(key).decrypt(base64.b64decode(sealed)).decode()
        raise DataLossError("it is sealed to another key than those of the key file")
