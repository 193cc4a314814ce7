"""Two commands in one folder, full and read-only disks: said clearly, and nothing is lost.

Kills are in test_resume.py and test_parallel_commands.py; many more by python -m tests.faults.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dsv3_mini import Transformer, train_command
from dsv3_mini.checkpoint import load_pretrained, save_pretrained
from dsv3_mini.config import ModelConfig
from dsv3_mini.course.spread import torchrun
from dsv3_mini.resume import LOCK, ResumeError, Run, hold
from dsv3_mini.shards import CheckpointError
from tests.environment import FIXED, ROOT
from tests.reference.folders import listing

resource = pytest.importorskip("resource")  # Windows has none

TRAIN = [
    *("--preset", "tiny", "--save-every", "2", "--warmup", "2"),
    *("--batch-size", "4", "--seq-len", "16", "--characters", "4000"),
]
LIMIT = 90


def begin(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, **FIXED}, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def children(process: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@contextmanager
def running(folder: Path, *start: str) -> Iterator[subprocess.Popen[str]]:
    """A training command that has saved in ``folder`` and has many steps to go; then killed."""
    process = begin(
        *start, "-m", "dsv3_mini.train", *TRAIN, "--steps", "9999", "--out", str(folder)
    )
    began = time.monotonic()
    try:
        while not any(folder.glob("step-*")):
            assert process.poll() is None
            assert time.monotonic() - began < LIMIT
            time.sleep(0.01)
        yield process
    finally:
        if process.poll() is None:
            found = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
            )
            for pid in (process.pid, *map(int, found.stdout.split())):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=LIMIT)


def train(folder: Path, *words: str) -> int:
    return train_command.main([*TRAIN, "--out", str(folder), *words])


def test_a_second_run_in_the_folder_is_refused_and_a_killed_one_does_not_hold_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with running(folder, sys.executable) as process:
        assert train(folder, "--steps", "9999") == 2
        said = capsys.readouterr().err
        assert f"{folder} is in use by process {process.pid} on " in said
        assert "since 2" in said
        assert "choose another --out" in said
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL
    assert (folder / LOCK).is_file()
    assert train(folder, "--steps", "3") == 2
    assert "steps was 9999 and is now 3" in capsys.readouterr().err
    assert not (folder / LOCK).exists()


def test_rank_0_of_a_job_holds_the_folder_for_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path / "run", *torchrun(2)) as job:
        assert train(tmp_path / "run") == 2
        said = capsys.readouterr().err
        assert any(f"in use by process {rank} on " in said for rank in children(job))
        steps = (tmp_path / "run" / "log.jsonl").read_text().count("\n")
        time.sleep(0.5)
        assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") > steps


def test_a_folder_is_never_held_twice(tmp_path: Path) -> None:
    """Eight callers of a lock whose file comes and goes; the lock is of the open file."""
    inside, most, taken, refused = 0, 0, 0, 0
    counting = threading.Lock()

    def caller() -> None:
        nonlocal inside, most, taken, refused
        for _ in range(100):
            try:
                with hold(tmp_path):
                    with counting:
                        inside, taken = inside + 1, taken + 1
                        most = max(most, inside)
                    time.sleep(0)
                    with counting:
                        inside -= 1
            except ResumeError:
                refused += 1

    threads = [threading.Thread(target=caller) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (taken + refused, most) == (800, 1)
    assert taken >= 8
    assert refused > 0, "nobody ever met another"
    assert listing(tmp_path) == {}


def test_a_refused_run_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "new" / "run", "--steps", "0") == 2
    assert "steps is 0" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert train(tmp_path / "mine") == 2
    assert "choose a new folder" in capsys.readouterr().err
    assert train(tmp_path / "mine" / "thesis.txt") == 2
    assert "is a file" in capsys.readouterr().err
    assert train(tmp_path / "mine" / "thesis.txt" / "run") == 2
    assert "choose another place" in capsys.readouterr().err
    assert listing(tmp_path) == {"mine": None, "mine/thesis.txt": b"x"}


# ---------------------------------------------------------------------------------- disks


class Disk:
    """A folder that can become full or read-only: a file system of its own where root may mount.

    Else no file may grow beyond a limit, which Python and safetensors meet as they meet a full
    disk, and the folder's permissions change.
    """

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self.mounted = folder, mounted
        folder.mkdir()
        if mounted:
            self._mount("size=16m")

    def _mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount a file system here")

    def fill(self, room: int) -> None:
        """Leave ``room`` bytes, rounded to pages."""
        if self.mounted:
            free = os.statvfs(self.folder)
            (self.folder / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_bsize - room))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    def free(self) -> None:
        """Make room again."""
        (self.folder / "ballast").unlink(missing_ok=True)
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    def write_protect(self, on: bool = True) -> None:
        if self.mounted:
            self._mount(f"remount,{'ro' if on else 'rw'}")
        else:
            for path in [*self.folder.rglob("*"), self.folder]:
                if path.is_dir():
                    path.chmod(0o555 if on else 0o755)

    def close(self) -> None:
        self.free()
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], capture_output=True)


@pytest.fixture(params=["file system", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    mounted = request.param == "file system"
    if mounted and os.geteuid():
        pytest.skip("only root may mount a file system")
    disk = Disk(tmp_path / "disk", mounted)
    try:
        yield disk
    finally:
        disk.write_protect(False)
        disk.close()


def before_save(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[], None]) -> None:
    save = Run.save

    def changed(run: Run) -> None:
        if run.state.step == step:
            change()
        save(run)

    monkeypatch.setattr(Run, "save", changed)


@pytest.mark.parametrize("room", [0, 200_000, 1_000_000], ids=["full", "in weights", "in moments"])
def test_a_disk_that_gets_full_costs_nothing_but_time(
    disk: Disk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: int,
) -> None:
    folder = disk.folder / "run"
    with monkeypatch.context() as patch:
        before_save(patch, 4, lambda: disk.fill(room))
        assert train(folder, "--steps", "6") == 2
    said = capsys.readouterr().err
    assert f"error: cannot save into {folder} (" in said
    assert "os error" in said.lower() or "errno" in said.lower()
    assert "make room, then start again with the same words" in said
    before = listing(folder)
    names = {name.partition("/")[0] for name in before}
    assert names == {"log.jsonl", "step-000002"}
    if room == 0:
        assert train(folder, "--steps", "6") == 2
        assert "error: cannot write" in capsys.readouterr().err
        assert listing(folder) == before
    disk.free()
    assert train(folder, "--steps", "6") == 0
    assert train(tmp_path / "whole", "--steps", "6") == 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(f / "step-000006" / file) for f in (folder, tmp_path / "whole"))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert len((folder / "log.jsonl").read_text().splitlines()) == 6


def test_a_checkpoint_on_a_full_disk_leaves_no_folder(disk: Disk) -> None:
    model = Transformer(ModelConfig.tiny())
    save_pretrained(model, disk.folder / "old")
    disk.fill(50_000)
    before = listing(disk.folder)
    for target, options in (("new/a/b", {}), ("old", {"overwrite": True})):
        with pytest.raises(CheckpointError, match=r"cannot write .* with room"):
            save_pretrained(model, disk.folder / target, **options)
        assert listing(disk.folder) == before
    disk.free()
    save_pretrained(model, disk.folder / "new" / "a" / "b")
    load_pretrained(disk.folder / "new" / "a" / "b")


def test_a_read_only_run_is_refused_and_goes_on_later(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not disk.mounted and os.geteuid() == 0:
        pytest.skip("root may write to a read-only folder")
    folder = disk.folder / "run"
    with monkeypatch.context() as patch:
        before_save(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert train(folder, "--steps", "6") == 130
    disk.write_protect()
    before = listing(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "step-000003"]
    capsys.readouterr()
    assert train(folder, "--steps", "6") == 2
    assert "choose another place" in capsys.readouterr().err
    assert listing(folder) == before
    disk.write_protect(False)
    assert train(folder, "--steps", "6") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "step-000006"]
