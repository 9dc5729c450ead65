"""A writer that is killed, or that runs out of disk, at any moment: the target is absent or whole."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pylomin
from pylomin.store.staging import Staging

ROOT = Path(__file__).resolve().parents[2]
OLD = {name: torch.zeros(20) for name in "abcd"}
NEW = {name: torch.ones(30) for name in "abcdef"}

# One interpreter: it forks a child for every kill, so that each takes milliseconds.
KILLER = """
import json, os, random, signal, sys, time
import torch, pylomin
from pylomin.store.open import open_store

directory, scenarios = sys.argv[1], json.loads(sys.argv[2])
OLD = {name: torch.zeros(20) for name in "abcd"}
NEW = {name: torch.ones(30) for name in "abcdef"}
CALLS = ["open", "pwrite", "fsync", "mkdir", "replace", "unlink", "close", "rmdir"]

os.fsync = lambda fd: None  # a killed process loses nothing that it wrote

def save_new(**options):
    return pylomin.save_store(NEW, directory, max_shard_size=new_shard, overwrite=overwrite, **options)

def clear():
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    if overwrite:
        pylomin.save_store(OLD, directory, max_shard_size=old_shard)

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid

def die_at(step):
    "Killed instead of the call number `step`, of all that change the disk."
    done = [0]
    def dying(call):
        def run(*args, **kwargs):
            if done[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            done[0] += 1
            return call(*args, **kwargs)
        return run
    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))
    save_new()
    os._exit(0)

def state():
    "Which checkpoint is there, read in full."
    index = os.path.join(directory, "model.safetensors.index.json")
    path = index if os.path.exists(index) else os.path.join(directory, "model.safetensors")
    if not os.path.exists(path):
        return "absent"
    report = pylomin.verify(path)
    assert report.ok and not report.without_digest, report
    if set(report.checked) == set(OLD):
        return "old"
    assert set(report.checked) == set(NEW), report
    return "new"

def after_kill(killed):
    found = state()
    leftovers = sum(name.startswith(".pylomin-") for name in os.listdir(directory))
    done = pylomin.save_store(NEW, directory, max_shard_size=new_shard, overwrite=overwrite or found != "absent")
    assert state() == "new"
    own = {done.name} | (set(json.load(open(done))["weight_map"].values()) if done.name.endswith("json") else set())
    return killed, found, leftovers, sorted(set(os.listdir(directory)) - own)

def at_every_step():
    step, finished = 0, False
    while not finished:
        clear()
        finished = os.waitpid(in_child(lambda: die_at(step)), 0)[1] == 0
        yield after_kill(not finished)
        step += 1

def at_random():
    clear()
    start = time.perf_counter()
    os.waitpid(in_child(lambda: (save_new(), os._exit(0))), 0)
    duration = time.perf_counter() - start
    for _ in range(20):
        clear()
        pid = in_child(lambda: (save_new(), os._exit(0)))
        time.sleep(random.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        yield after_kill(os.WIFSIGNALED(os.waitpid(pid, 0)[1]))

outcomes = {}
for name, (old_shard, new_shard, overwrite) in scenarios.items():
    outcomes[name] = list(at_random() if name == "at random" else at_every_step())
print(json.dumps(outcomes))
"""


# Bytes in a shard of what was there, and of what is written; may what was there be replaced?
SCENARIOS: dict[str, tuple[int | None, int | None, bool]] = {
    "file": (None, None, False),
    "file over file": (None, None, True),
    "shards": (None, 300, False),
    "shards over shards": (100, 300, True),
    "file over shards": (100, None, True),
    "at random": (100, 300, True),
}
POSSIBLE = {
    "file": {"absent", "new"},
    "file over file": {"old", "new"},
    "shards": {"absent", "new"},
    "shards over shards": {"old", "absent", "new"},
    "file over shards": {"old", "new"},
    "at random": {"old", "absent", "new"},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[bool, str, int, list[str]]]]:
    """For each kill: was it one, what was found, how many leftovers, and what was left after the next run."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path_factory.mktemp("killed")), json.dumps(SCENARIOS)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed(scenario: str, outcomes: dict[str, list[tuple[bool, str, int, list[str]]]]) -> None:
    runs = outcomes[scenario]
    found = {state for _, state, _, _ in runs}
    assert [strangers for *_, strangers in runs if strangers] == []
    if scenario == "at random":
        assert len(runs) == 20
        assert found <= POSSIBLE[scenario]
        return
    assert sum(killed for killed, *_ in runs) >= 10
    assert sum(leftovers for _, _, leftovers, _ in runs) >= 5  # there was something to clean up
    assert found == POSSIBLE[scenario]


def concerns_a_directory(call: str, args: tuple) -> bool:
    """Looking at one, or locking or removing it: a full disk does not prevent that."""
    return (call == "open" and not args[1] & os.O_CREAT) or (
        call == "close" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
    )


@pytest.mark.parametrize("shard", [None, 300])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "open", "mkdir", "close", "replace"])
def test_disk_full_at_every_step(shard: int | None, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind, and what was there is still there."""
    (tmp_path / "config.json").write_text("precious")
    real = getattr(os, call)
    failures = 0
    for step in itertools.count(1):
        done = 0

        def fail(*args, **kwargs):
            nonlocal done
            done += 1
            if done == step and not concerns_a_directory(call, args):
                if call == "close":
                    real(*args, **kwargs)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                pylomin.save_store(NEW, tmp_path / "new", max_shard_size=shard)
            except pylomin.StoreWriteError as error:
                assert "No space left on device" in str(error)  # noqa: PT017
                failures += 1
        if (tmp_path / "new").exists():  # what failed is not needed, or came when all was there
            assert pylomin.verify(tmp_path / "new").ok
            assert not [name for name in os.listdir(tmp_path / "new") if name.startswith(".")]
            shutil.rmtree(tmp_path / "new")
        assert os.listdir(tmp_path) == ["config.json"]
        if done < step:
            break
    assert failures >= 1


def test_file_size_limit(tmp_path: Path) -> None:
    """A real refusal by the system, in the second of three shards."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        tensors = {"a": torch.zeros(10), "b": torch.zeros(1 << 16), "c": torch.zeros(10)}
        with pytest.raises(pylomin.StoreWriteError, match=r"File too large.*Free some space"):
            pylomin.save_store(tensors, tmp_path / "x", max_shard_size=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    nested: list[Path] = []

    def write_meanwhile(done: int, total: int) -> None:
        if not nested:
            nested.append(pylomin.save_store(OLD, tmp_path, overwrite=True))

    source = pylomin.save_store(NEW, tmp_path / "source.safetensors")
    path = pylomin.save_store(source, tmp_path, overwrite=True, progress=write_meanwhile)
    assert nested == [path]
    assert set(pylomin.verify(path).checked) == set(NEW)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "source.safetensors"]


def test_leftovers_of_another_target_are_left_alone(tmp_path: Path) -> None:
    dead = Staging(str(tmp_path), "other")
    os.close(dead._fd)
    dead._fd = None
    pylomin.save_store(NEW, tmp_path)
    assert Path(dead.path).exists()
    Staging(str(tmp_path), "other").discard()
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    "journal", [b"", b"[", b"[]", b'{"new": 1}', b'{"new": [1], "old": []}', b'{"new": ["../x"], "old": []}']
)
def test_a_damaged_journal_does_no_harm(journal: bytes, tmp_path: Path) -> None:
    dead = Staging(str(tmp_path), "model")
    os.close(dead._fd)
    dead._fd = None
    (tmp_path.parent / "x").write_text("precious")
    (Path(dead.path) / "publishing.json").write_bytes(journal)
    pylomin.save_store(NEW, tmp_path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert (tmp_path.parent / "x").exists()


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none."""

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    dead = Staging(str(tmp_path), "model")
    monkeypatch.setattr("fcntl.flock", refuse)
    pylomin.save_store(NEW, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([Path(dead.path).name, "model.safetensors"])
    dead.discard()
