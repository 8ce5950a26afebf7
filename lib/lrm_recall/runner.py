"""Running one notebook: papermill, with this interpreter as kernel, and proof that it did what it promises.

The notebook is executed into <name>.running.ipynb. Only when every cell has run and every promise is kept
does it become <name>.ipynb, in one step; otherwise it becomes <name>.failed.ipynb, and a good one stays.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat

from lrm_recall import provenance
from lrm_recall.promises import broken_promises
from lrm_recall.terminal import NotebookLines


class NotebookFailed(RuntimeError):
    """A notebook that did not run to its end, or did not keep its promises; the message is one line."""


@dataclass(frozen=True)
class Job:
    """One notebook to run.

    Attributes:
        source: the notebook.
        parameters: what is injected behind its parameters cell.
        output_dir: where the executed notebook goes.
        root: the kernel's working directory; relative paths in the notebook start here.
        timeout_s: seconds that one cell may take.
        fresh: whether promised rows must be of this run.
    """

    source: Path
    parameters: dict[str, Any]
    output_dir: Path
    root: Path
    timeout_s: int
    fresh: bool

    def path(self, kind: str = "") -> Path:
        """Where the executed notebook is: `kind` is "", ".running" or ".failed"."""
        return self.output_dir / f"{self.source.stem}{kind}.ipynb"


def kernel_problem(notebook: nbformat.NotebookNode) -> str | None:
    """Why this interpreter cannot be the notebook's kernel; None when it can."""
    wanted = notebook.metadata.get("kernelspec", {}).get("name", "python3")
    if wanted != "python3":
        return f"it asks for the kernel {wanted!r}, and only 'python3', this interpreter, is used"
    if importlib.util.find_spec("ipykernel") is None:
        return f"there is no Jupyter kernel in {sys.prefix}: install ipykernel there"
    return None


def run_job(job: Job) -> Path:
    """Run a notebook; returns the executed notebook.

    Raises:
        NotebookFailed: when a cell raises or takes too long, or a promise is not kept.
    """
    job.output_dir.mkdir(parents=True, exist_ok=True)
    running, begun = job.path(".running"), datetime.now(UTC)
    problem = "it was interrupted"
    try:
        problem = _execute(job, running)
        if problem is None:
            notebook = nbformat.read(running, as_version=4)
            problem = "; ".join(broken_promises(notebook, job.root, begun, job.fresh)) or None
    except ValueError as error:  # a corrupt store
        problem = str(error)
    finally:
        if running.exists():
            _sign(job, running, begun)
            os.replace(running, job.path(".failed" if problem else ""))
    if problem:
        raise NotebookFailed(f"{job.source.stem}: {problem} (see {_relative(job.path('.failed'), job.root)})")
    job.path(".failed").unlink(missing_ok=True)
    return job.path()


def _execute(job: Job, running: Path) -> str | None:
    """Execute the notebook into `running`; why it stopped early, in one line, or None."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    with _lines() as lines:
        try:
            papermill.execute_notebook(
                job.source,
                running,
                parameters=job.parameters,
                kernel_name="python3",
                language="python",
                kernel_manager_class=_this_interpreter(),
                cwd=job.root,
                execution_timeout=job.timeout_s,
                progress_bar={"desc": job.source.stem, "file": sys.stderr},
                stderr_file=lines,
                coalesce_streams=True,  # of a progress bar only the last state is kept
            )
        except papermill.PapermillExecutionError as error:
            said = " ".join(f"{error.ename}: {error.evalue}".split())
            return f"cell [{error.exec_count}] failed: {said[:400]}"
        except CellTimeoutError:
            return f"a cell took longer than {job.timeout_s} s (--timeout)"
        except DeadKernelError:
            return "the kernel died (killed, or out of memory)"
        except RuntimeError as error:  # from jupyter_client: the kernel did not start
            return " ".join(str(error).split())
    return None


@contextlib.contextmanager
def _lines() -> Iterator[NotebookLines]:
    """The notebook's stderr on our terminal; what papermill and asyncio log of a failure is ours to tell."""
    for name in ("papermill", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    lines = NotebookLines()
    try:
        yield lines
    finally:
        lines.close()


def _this_interpreter() -> type:
    """A kernel manager whose kernel is this very Python, whatever kernels the user has registered."""
    import zmq
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisInterpreter(AsyncKernelManager):
        # Other users of this machine can reach its loopback ports.
        transport_encryption = "auto" if zmq.has("curve") else "disabled"

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(**get_kernel_dict(extra_arguments=["--log-level=CRITICAL"]))

    return ThisInterpreter


def _sign(job: Job, path: Path, begun: datetime) -> None:
    """Write into the executed notebook where it comes from."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["lrm_recall"] = {
        "parameters": job.parameters,
        "provenance": provenance.snapshot(),
        "begun": begun.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - begun).total_seconds(), 1),
    }
    if "papermill" in notebook.metadata:  # absolute paths of this machine mean nothing on another
        notebook.metadata["papermill"]["input_path"] = _relative(job.source, job.root)
        notebook.metadata["papermill"]["output_path"] = _relative(job.path(), job.root)
    nbformat.write(notebook, path)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
