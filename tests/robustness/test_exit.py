"""The interpreter ends while models are alive: promptly, silently, and with nothing left on disk."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from .common import run_script

PREAMBLE = """
import gc, os, sys, threading, torch, pylomin
from torch import nn
torch.set_num_threads(1)
def stack(layers=3):
    return nn.Sequential(*[nn.Linear(264, 264) for _ in range(layers)])
x = torch.ones(1, 264)
torch.set_grad_enabled(False)
"""

SCRIPTS = {
    "a live model with prefetch": """
        model = pylomin.prefetch(pylomin.lazy_loading(stack(), memory_budget="1MiB"), depth=2)
        for _ in range(3):
            model(x)
    """,
    "a live model with an overlay": """
        model = pylomin.prefetch(pylomin.lazy_loading(stack()))
        model[0].bias.add_(1)
        model(x)
        model(x)
    """,
    "several models": """
        models = [pylomin.prefetch(pylomin.lazy_loading(stack(2))) for _ in range(5)]
        for model in models:
            model(x)
            model(x)
    """,
    "a model in a cycle": """
        model = pylomin.prefetch(pylomin.lazy_loading(stack()))
        model.myself = [model]
        model(x)
        model(x)
    """,
    "a model that nobody ran": """
        model = pylomin.prefetch(pylomin.lazy_loading(stack()))
    """,
    "a model used by a thread that ends later": """
        model = pylomin.prefetch(pylomin.lazy_loading(stack()))
        expected = model(x)
        main = threading.main_thread()
        def work():
            torch.set_grad_enabled(False)
            main.join()
            for _ in range(5):
                assert torch.equal(model(x), expected)
        threading.Thread(target=work).start()
    """,
    "a model used at exit": """
        import atexit
        model = pylomin.prefetch(pylomin.lazy_loading(stack()))
        expected = model(x)
        model(x)
        atexit.register(lambda: model(x))
    """,
    "an exit from within a forward": """
        model = pylomin.prefetch(pylomin.lazy_loading(stack()))
        model(x)
        model(x)
        model[1].register_forward_hook(lambda *_: sys.exit(0))
        model(x)
    """,
    "peak memory being measured": """
        model = pylomin.prefetch(pylomin.lazy_loading(stack()))
        with pylomin.peak_memory(model):
            model(x)
            sys.exit(0)
    """,
}


FAILING = {
    "an exception": """
        model = pylomin.prefetch(pylomin.lazy_loading(stack()))
        model(x)
        model(x)
        model(x[:, :-1])
    """,
}

# Each script runs in a child of one process that has imported torch already, and ends as any interpreter does.
ZYGOTE = """
import json, os, sys, tempfile
scripts, directory = json.loads(sys.argv[1]), sys.argv[2]
{preamble}
pylomin.lazy_loading(stack(1))
children = {{}}
for number, (name, script) in enumerate(scripts.items()):
    scratch = os.path.join(directory, str(number))
    os.mkdir(scratch)
    pid = os.fork()
    if pid == 0:
        os.environ["TMPDIR"] = scratch
        output = os.open(os.path.join(directory, f"{{number}}.txt"), os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        exec(script)
        break
    children[name] = number, pid
else:
    outcomes = {{}}
    for name, (number, pid) in children.items():
        _, status = os.waitpid(pid, 0)
        left = [entry for entry in os.listdir(os.path.join(directory, str(number))) if entry.startswith("pylomin")]
        with open(os.path.join(directory, f"{{number}}.txt")) as output:
            outcomes[name] = output.read(), os.waitstatus_to_exitcode(status), left
    print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int, list[str]]]:
    """Output, exit code and files left of each script."""
    scripts = {name: textwrap.dedent(script) for name, script in (SCRIPTS | FAILING).items()}
    zygote = ZYGOTE.format(preamble=PREAMBLE)
    done = run_script(zygote, json.dumps(scripts), str(tmp_path_factory.mktemp("exit")))
    assert (done.stderr, done.returncode) == ("", 0)
    return {name: (text, code, left) for name, (text, code, left) in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_exit_with(name: str, outcomes: dict[str, tuple[str, int, list[str]]]) -> None:
    assert outcomes[name] == ("", 0, [])


def test_exit_after_an_exception(outcomes: dict[str, tuple[str, int, list[str]]]) -> None:
    text, code, left = outcomes["an exception"]
    assert text.startswith("Traceback")
    assert text.count("Traceback") == 1
    assert "Exception ignored" not in text
    assert (code, left) == (1, [])


def test_exit_while_a_background_read_runs(scratch: Path) -> None:
    """The interpreter waits for the read, as for any thread; then it ends."""
    script = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from robustness.common import faulty_stack, in_prefetch_thread, forward
    from pylomin.lazy.offload import residencies_of
    import threading, torch, pylomin
    torch.set_num_threads(1)
    x, expected, model, store = faulty_stack(3)
    pylomin.prefetch(model)
    forward(model, x)
    forward(model, x)
    residencies_of(model)[0].set_depth(0)
    reached, ending = threading.Event(), threading.Event()
    threading._register_atexit(ending.set)
    def until_the_end(names):
        if in_prefetch_thread():
            reached.set()
            ending.wait()
    store.before_read = until_the_end
    residencies_of(model)[0].set_depth(1)
    model.layers[0].register_forward_hook(lambda *_: sys.exit(0) if reached.wait(30) else None)
    forward(model, x)
    """
    done = run_script(script, str(Path(__file__).resolve().parents[1]))
    assert (done.stderr, done.returncode) == ("", 0)
    assert list(scratch.iterdir()) == []
