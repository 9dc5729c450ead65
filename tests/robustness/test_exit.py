"""The interpreter ends while models are alive: promptly, silently, and with nothing left on disk."""

from __future__ import annotations

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
    "a live model": """
        model = pylomin.lazy_loading(stack())
        model(x)
    """,
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
    "a model used by a daemon thread": """
        model = pylomin.prefetch(pylomin.lazy_loading(stack()))
        ready = threading.Event()
        def work():
            torch.set_grad_enabled(False)
            while True:
                model(x)
                ready.set()
        threading.Thread(target=work, daemon=True).start()
        ready.wait()
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
        measuring = pylomin.peak_memory(model)
        measuring.__enter__()
        model(x)
        sys.exit(0)
    """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_exit_with(name: str, scratch: Path) -> None:
    import textwrap

    done = run_script(PREAMBLE + textwrap.dedent(SCRIPTS[name]))
    assert (done.stderr, done.stdout, done.returncode) == ("", "", 0)
    assert list(scratch.iterdir()) == []


def test_exit_while_a_background_read_runs(scratch: Path) -> None:
    """The interpreter waits for the read, as for any thread; then it ends."""
    script = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from robustness.common import faulty_stack, in_prefetch_thread, forward
    import threading, torch, pylomin
    torch.set_num_threads(1)
    x, expected, model, store = faulty_stack(3)
    pylomin.prefetch(model)
    forward(model, x)
    forward(model, x)
    main, reached = threading.main_thread(), threading.Event()
    def until_main_has_ended(names):
        if in_prefetch_thread():
            reached.set()
            while main.is_alive():
                main.join(0.01)
    store.before_read = until_main_has_ended
    forward(model, x) if False else None
    from pylomin.lazy.offload import residencies_of
    residencies_of(model)[0].set_depth(0)
    residencies_of(model)[0].set_depth(1)
    threading.Thread(target=forward, args=(model, x), daemon=True).start()
    assert reached.wait(30)
    """
    done = run_script(script, str(Path(__file__).resolve().parents[1]))
    assert (done.stderr, done.returncode) == ("", 0)
    assert list(scratch.iterdir()) == []


def test_exit_after_an_exception(scratch: Path) -> None:
    script = """
    model = pylomin.prefetch(pylomin.lazy_loading(stack()))
    model(x)
    model(x)
    model(x[:, :-1])
    """
    import textwrap

    done = run_script(PREAMBLE + textwrap.dedent(script))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "Exception ignored" not in done.stderr
    assert list(scratch.iterdir()) == []
