"""``pylomin generate``."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from pylomin.cli.arguments import Budget, Directory, Dtype, ModelDtype, dtype_name
from pylomin.cli.output import note, working
from pylomin.errors import PassError
from pylomin.io.sizes import format_bytes

_INCOMPLETE = "\ufffd"  # what a character of several tokens ends with until all of them are there


def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the text begins with.")],
    budget: Budget = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after so many.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; higher values are less predictable.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the choice of tokens, with --temperature.")] = None,
    dtype: ModelDtype = None,
) -> None:
    """Write text with a language model under a memory budget, each token as it comes.

    The text goes to stdout; speed and memory to stderr, at the end. The tokenizer is that of DIRECTORY.
    """
    import torch

    from pylomin.cli.models import import_transformers
    from pylomin.measure import peak_memory, stats

    transformers = import_transformers()
    with working("Opening the model"):
        tokenizer = _tokenizer(transformers, directory)
        model = _fitted(transformers, directory, budget, dtype)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].shape[1]:
        raise PassError("the prompt has no tokens. Give a longer one.")
    if seed is not None:
        torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    streamer = _timed_streamer(transformers, tokenizer)
    with peak_memory(tensors=False) as peak, torch.inference_mode():
        model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **options)
    spent = stats(model)
    note(f"{_speed(streamer.times)}, first token after {streamer.times[0] - streamer.started:.2f} s")
    allowed = format_bytes(spent.memory_budget or 0)
    note(
        f"memory: {format_bytes(spent.peak_bytes)} of weights at most (budget {allowed}), "
        f"{format_bytes(peak.process_bytes)} in all; read {format_bytes(spent.bytes_read)} ({spent.reading_mode})"
    )


def _fitted(transformers: Any, directory: Any, budget: int | None, dtype: Dtype | None) -> Any:
    from pylomin.cli.models import open_model
    from pylomin.passes.fit import fit

    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    auto_class = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    name = None if dtype is None else dtype_name(dtype)
    return fit(open_model(directory, dtype=name, auto_class=auto_class), budget)


def _tokenizer(transformers: Any, directory: Any) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise PassError(f"transformers finds no tokenizer in {str(directory)!r}: {error}") from error


def _timed_streamer(transformers: Any, tokenizer: Any) -> Any:
    """Writes each token to stdout as soon as it is text, and knows when it came.

    Not transformers' TextStreamer, which waits for the end of a word.
    """

    class TimedStreamer(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.started = time.perf_counter()
            self.times: list[float] = []
            self._has_prompt = False
            self._line: list[int] = []
            self._shown = ""

        def put(self, value: Any) -> None:
            if not self._has_prompt:
                self._has_prompt = True
                return
            self.times.append(time.perf_counter())
            self._line += value.reshape(-1).tolist()
            text = tokenizer.decode(self._line, skip_special_tokens=True)
            if not text.endswith(_INCOMPLETE):
                self._show(text)
                if text.endswith("\n"):
                    self._line, self._shown = [], ""

        def end(self) -> None:
            self._show(tokenizer.decode(self._line, skip_special_tokens=True) + "\n")

        def _show(self, text: str) -> None:
            sys.stdout.write(text[len(self._shown) :])
            sys.stdout.flush()
            self._shown = text

    return TimedStreamer()


def _speed(times: list[float]) -> str:
    """The first token waits for the prompt, so that it is not counted."""
    count = f"{len(times)} token{'s' * (len(times) != 1)}"
    if len(times) < 2:
        return count
    return f"{count}, {(len(times) - 1) / (times[-1] - times[0]):.2f} tokens/s"
