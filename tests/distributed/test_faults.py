"""A rank that dies or whose disk fails: every rank ends with an error, in bounded time."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import join, outputs, start
from tests.distributed.test_tensor_parallel import distributed, tokens

TIMEOUT_S = 5  # of a collective
FAILING = 1
AT = 3  # forwards that all ranks finish


def main(rank: int, ranks: int, directory: str, fault: str) -> None:
    torch.set_num_threads(1)
    join(rank, ranks, directory, TIMEOUT_S)
    model = distributed(Path(directory), "prefetch")
    with torch.no_grad():
        for number in range(1000):
            if number == AT and rank == FAILING:
                break_down(fault, Path(directory))
            began = time.monotonic()
            try:
                model(tokens())
            except Exception as error:
                print(f"{type(error).__name__}: {error}", f"after {number} forwards")
                print(f"waited {time.monotonic() - began:.1f} s")
                sys.stdout.flush()
                os._exit(3)  # torchrun ends the others when one fails; here each finds out alone


def break_down(fault: str, directory: Path) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        time.sleep(60)
    os.truncate(directory / f"block{FAILING}.safetensors", 1000)


@pytest.mark.parametrize("fault", ["killed", "stopped", "truncated"])
def test_every_rank_ends(fault: str, tmp_path: Path) -> None:
    began = time.monotonic()
    processes = start("test_faults", 2, tmp_path, fault)
    survivor = outputs(processes[:1], timeout_s=60)[0]
    took_s = time.monotonic() - began
    if fault == "stopped":
        processes[FAILING].kill()
    status, said = outputs(processes[FAILING:])[0]
    assert survivor[0] == 3, survivor
    assert f"after {AT} forwards" in survivor[1], survivor
    assert took_s < 45, survivor
    if fault == "truncated":
        assert status == 3, said
        assert f"block{FAILING}.safetensors" in said, said
        assert "StoreReadError" in said or "StoreChangedError" in said, said
    else:
        assert status == -signal.SIGKILL, said
