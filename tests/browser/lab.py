"""A walkthrough in JupyterLab, used as a person uses it: what is done here is clicking, typing and looking.

JupyterLab runs on this machine alone, with a token, in folders of its own: no setting of the person who runs the
tests is read or changed, and no news is fetched.
"""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Locator, Page

START_S, RUN_S, MOVE_S = 60, 240, 15  # the longest to wait for the server, for a notebook, for a figure

# Keeps in `box.lags` the milliseconds from each press of a key to the moment at which another figure is decoded.
_TIME_MOVES = """box => {
    const shown = () => box.querySelector(".widget-output img");
    let pressed = null, before = null;
    box.lags = [];
    box.addEventListener("keydown", () => { pressed = performance.now(); before = shown()?.src; }, true);
    new MutationObserver(async () => {
        const image = shown(), since = pressed;
        if (since === null || image === null || image.src === before) return;
        pressed = null;
        await image.decode();
        box.lags.push(performance.now() - since);
    }).observe(box.querySelector(".widget-output"), {childList: true, subtree: true});
}"""


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """JupyterLab over a folder: yields the address of its files, to which `{path}` is to be added, with the token.

    Raises:
        RuntimeError: it ended, or did not answer in START_S seconds; with what it said.
    """
    own, token, port = folder / ".jupyter", secrets.token_hex(16), _free_port()
    homes = ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
             "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    (own / "HOME").mkdir(parents=True)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    log = own / "log"
    with log.open("w") as written:
        server = subprocess.Popen(command, env={**os.environ, **{name: str(own / name) for name in homes},
                                                "JUPYTER_TOKEN": token}, stdout=written, stderr=written)
        try:
            until = time.monotonic() + START_S
            while not _listens(port):
                if server.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/lab/tree/{{path}}?token={token}"
        finally:
            server.terminate()  # it ends its kernels first
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def copy_notebook(source: Path, folder: Path) -> str:
    """A notebook with its text pair, as in a checkout; returns its path below the folder."""
    (folder / "notebooks").mkdir(exist_ok=True)
    for suffix in (".ipynb", ".py"):
        shutil.copy(source.with_suffix(suffix), folder / "notebooks")
    return f"notebooks/{source.stem}.ipynb"


def png(data: bytes) -> str:
    """The address that a page gives to an image that it holds itself."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


class Walkthrough:
    """A notebook that is open in JupyterLab.

    Args:
        page: where to open it.
        address: of the notebook, with the server's token.
        pictures: folder for screenshots.
    """

    def __init__(self, page: Page, address: str, pictures: Path):
        self.page, self.pictures = page, pictures
        page.goto(address)
        page.locator(".jp-CodeCell .cm-line").first.wait_for()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.get_by_role("button", name="No", exact=True).click()  # no news, please: the question hides the page

    def set_interactive(self) -> None:
        """In the parameters cell, replace False by True behind INTERACTIVE: double click on the word, type."""
        line = self.page.locator(".cm-line", has_text="INTERACTIVE: bool")
        line.get_by_text("False", exact=True).dblclick()
        self.page.keyboard.type("True")
        assert "INTERACTIVE: bool = True" in line.inner_text()

    def run_all(self) -> None:
        """Run > Run All Cells."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def wait_until_idle(self) -> None:
        """Until every cell has run and the kernel's sign is that of rest."""
        self.page.wait_for_function(
            """() => {
                const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(e => e.textContent);
                const status = document.querySelector(".jp-Notebook-ExecutionIndicator").dataset.status;
                return status === "idle" && prompts.length > 0 && prompts.every(text => /\\[\\d+\\]/.test(text));
            }""", timeout=1e3 * RUN_S)

    def problems(self) -> list[str]:
        """What the notebook shows of errors and warnings."""
        red = ".jp-OutputArea-output[data-mime-type$='error'], .jp-OutputArea-output[data-mime-type$='stderr']"
        return self.page.locator(red).evaluate_all("outputs => outputs.map(output => output.textContent)")

    def boxes(self) -> list[Box]:
        """The figures with sliders, from top to bottom."""
        found = self.page.locator(".jp-Notebook .widget-interact")
        return [Box(found.nth(index)) for index in range(found.count())]

    def photograph_outputs(self) -> None:
        """Every output of the notebook as pictures/NN.png, in their order."""
        outputs = self.page.locator(".jp-Notebook .jp-Cell-outputWrapper > .jp-OutputArea > .jp-OutputArea-child")
        for index in range(outputs.count()):
            picture = outputs.nth(index)
            picture.scroll_into_view_if_needed()
            picture.screenshot(path=self.pictures / f"{index:02}.png")


class Box:
    """A figure below its sliders."""

    def __init__(self, box: Locator):
        self.box = box
        box.evaluate(_TIME_MOVES)

    @property
    def labels(self) -> list[str]:
        """What stands beside the sliders."""
        return self.box.locator(".widget-hslider .widget-label").all_text_contents()

    def readout(self, label: str) -> str:
        """The value that a slider shows."""
        return self._slider(label).locator(".widget-readout").text_content()

    @property
    def figure(self) -> str:
        """The address of the image that is shown, which holds all its bytes."""
        return self.box.locator(".widget-output img").get_attribute("src")

    def press(self, label: str, key: str) -> None:
        """A key, ArrowLeft or ArrowRight, on the handle of a slider."""
        self._slider(label).locator(".noUi-handle").press(key)

    def drag_to_the_end(self, label: str) -> None:
        """Pull the handle of a slider to its right end with the mouse."""
        mouse, rail = self.box.page.mouse, self._slider(label).locator(".noUi-base")
        self._slider(label).locator(".noUi-handle").hover()  # waits until the page has come to rest
        mouse.down()
        place = rail.bounding_box()
        mouse.move(place["x"] + place["width"] + 20, place["y"] + place["height"] / 2, steps=4)
        mouse.up()

    def comes_to_show(self, figure: str) -> bool:
        """Whether the image is shown within MOVE_S seconds."""
        until = time.monotonic() + MOVE_S
        while time.monotonic() < until:
            if self.box.locator(".widget-output img").count() and self.figure == figure:
                return True
            time.sleep(0.01)
        return False

    def take_lags(self) -> list[float]:
        """Milliseconds from each press of a key to its figure, since this was asked last."""
        return self.box.evaluate("box => box.lags.splice(0)")

    def screenshot(self, path: Path) -> None:
        self.box.screenshot(path=path)

    def _slider(self, label: str) -> Locator:
        return self.box.locator(".widget-hslider").filter(has=self.box.page.get_by_text(label, exact=True))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
