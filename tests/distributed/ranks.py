"""Real processes, one for each rank, that run many cases in one launch: starting one takes seconds."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60  # of a collective whose other ranks do not come
LAUNCH_S = 200


def start(module: str, ranks: int, directory: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """Processes that run ``main(rank, ranks, directory, *arguments)`` of a module of the tests."""
    call = f"from tests.distributed.{module} import main; main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])"
    return [
        subprocess.Popen(
            [sys.executable, "-c", f"import sys; {call}", str(rank), str(ranks), str(directory), *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def outputs(processes: list[subprocess.Popen[str]], timeout_s: float = LAUNCH_S) -> list[tuple[int, str]]:
    """The exit status of each, and what it said. None is left running."""
    try:
        return [(p.wait(timeout_s), "") if p.stdout is None else _output(p, timeout_s) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _output(process: subprocess.Popen[str], timeout_s: float) -> tuple[int, str]:
    said, _ = process.communicate(timeout=timeout_s)
    return process.returncode, said


def launch(module: str, ranks: int, directory: Path) -> dict[str, list[Any]]:
    """Run all cases of a module in ``ranks`` processes joined by gloo.

    Returns:
        For each case what each rank says of it: None, or the traceback of what it raised.
    """
    ended = outputs(start("ranks", ranks, directory, module))
    said = "\n".join(f"rank {rank}:\n{text}" for rank, (_, text) in enumerate(ended))
    assert not any(status for status, _ in ended), said
    found = [pickle.loads((directory / f"rank{rank}.pickle").read_bytes()) for rank in range(ranks)]
    return {name: [results[name] for results in found] for name in found[0]}


def main(rank: int, ranks: int, directory: str, module: str) -> None:
    torch.set_num_threads(1)
    join(rank, ranks, directory)
    cases = importlib.import_module(f"tests.distributed.{module}").CASES
    results: dict[str, Any] = {}
    for name, case in cases.items():
        results[name] = None
        try:
            case(Path(directory))
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], flush=True)  # if the others, which did not raise, wait in vain
        dist.barrier()
    Path(directory, f"rank{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


def join(
    rank: int, ranks: int, directory: str | Path, timeout_s: float = TIMEOUT_S, device: torch.device | None = None
) -> None:
    """By gloo, or of a ``device`` by nccl."""
    dist.init_process_group(
        "gloo" if device is None else "nccl",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
        device_id=device,
    )


def check(results: list[Any]) -> None:
    """No rank raised."""
    for rank, result in enumerate(results):
        assert result is None, f"rank {rank}:\n{result}"
