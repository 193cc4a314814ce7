"""A JupyterLab of its own, on a copy of the notebooks, for tests that open it in a browser.

It listens on loopback only, wants a token made for this run, and knows none of the user's own
settings, so that nothing of theirs is changed and nothing of theirs changes a test.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat

from tests.environment import FIXED, ROOT

START = 60  # seconds for the server, on a busy machine
NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
]


def chromium() -> str | None:
    """The browser to use: $DSV3_CHROMIUM, or the first one on the path."""
    found = (shutil.which(name) for name in NAMES)
    return os.environ.get("DSV3_CHROMIUM") or next((path for path in found if path), None)


@dataclass
class Lab:
    """A running server: its folder, its address and its token."""

    folder: Path
    address: str
    token: str

    def write(self, name: str, *sources: str) -> str:
        """A notebook with one code cell for each source, and its name."""
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec})
        nbformat.write(notebook, self.folder / name)
        return name

    def part(self, name: str, marks: tuple[str, ...], *sources: str) -> str:
        """A copy of a notebook with more code cells at its end, and its name.

        Of its own code cells it has the imports, and those that contain one of ``marks``: nbval
        runs all of them, and most of a notebook's time goes into training. ValueError if a mark
        is nowhere.
        """
        notebook = nbformat.read(self.folder / name, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        if lost := [mark for mark in marks if not any(mark in cell.source for cell in code)]:
            raise ValueError(f"{name} has no code cell with {lost}; name what its cells contain")
        kept = code[:2] + [c for c in code[2:] if any(mark in c.source for mark in marks)]
        notebook.cells = kept + [nbformat.v4.new_code_cell(source) for source in sources]
        nbformat.write(notebook, self.folder / f"part_{name}")
        return f"part_{name}"


@contextmanager
def running_lab(scratch: Path) -> Iterator[Lab]:
    """A JupyterLab on a copy of notebooks/ in ``scratch``. RuntimeError if it does not start."""
    folder = scratch / "notebooks"
    ignored = shutil.ignore_patterns(".*", "*.pyc")
    shutil.copytree(ROOT / "notebooks", folder, ignore=ignored)
    settings = scratch / "jupyterlab_settings_dir" / "@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    quiet = '{"fetchNews": "false", "checkForUpdates": false}'  # or it asks, over the notebook
    (settings / "notification.jupyterlab-settings").write_text(quiet)
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
           "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")  # fmt: skip
    token = secrets.token_hex(16)
    environment = os.environ | FIXED | {name: str(scratch / name.lower()) for name in own}
    environment |= {"JUPYTER_TOKEN": token, "JUPYTER_PREFER_ENV_PATH": "1"}
    environment["PYTHONPATH"] = str(ROOT)  # kernels test this tree, whatever is installed
    environment.pop("MPLBACKEND", None)  # figures go to the notebook
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True",
               "--LabApp.news_url=None", "--LabApp.extension_manager=readonly",
               "--LabApp.check_for_updates_class="
               "jupyterlab.handlers.announcements.NeverCheckForUpdate"]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")
    log = scratch / "lab.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
        )  # fmt: skip
    try:
        lab = Lab(folder, f"http://127.0.0.1:{port}", token)
        wait_for_server(lab, process, log)
        yield lab
    finally:
        process.terminate()  # the server then ends its kernels
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_server(lab: Lab, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START
    while process.poll() is None and time.monotonic() < end:
        try:
            with direct.open(f"{lab.address}/api/status?token={lab.token}", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start; the end of its log:\n{log.read_text()[-2000:]}")
