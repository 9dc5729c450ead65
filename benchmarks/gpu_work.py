"""The processes that the GPU benchmark measures: one model, run in one way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import pylomin
from benchmarks import gpu_device
from benchmarks.gpu_rows import Interval, Task, llama_bytes
from benchmarks.llama import empty
from benchmarks.passes import Report
from pylomin.residency.device import Device, device_of
from pylomin.residency.pinned import PinnedMemory

DTYPE = torch.bfloat16
PREFILL_TOKENS = {"full": 2048, "tiny": 32}
PROMPT_TOKENS = 8
WARM_UP_TOKENS = 2
DECODED_TOKENS = 6
BERT_TOKENS = 512
BANDWIDTH_BYTES = {"full": 256 << 20, "tiny": 4 << 20}
REPEATS = 8
TILE_ROWS = 512  # of the chunked linears of BERT


def size_of(config: LlamaConfig) -> int:
    """Bytes of the weights, in the dtype of this benchmark."""
    return llama_bytes(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        itemsize=DTYPE.itemsize,
    )


def llama(config: LlamaConfig) -> nn.Module:
    """The model, in the dtype of its checkpoint."""
    model: nn.Module = LlamaForCausalLM(config).to(DTYPE)
    return model


def synchronized(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run``, and wait until the device has done it."""

    def wait() -> Any:
        result = run()
        gpu_device.gpu.synchronize()
        return result

    return wait


def bandwidth(size: str) -> dict[str, Any]:
    """Bytes per second from our pinned memory to the device, the best of some copies."""
    gpu = gpu_device.gpu
    device = gpu.device
    nbytes = BANDWIDTH_BYTES[size]
    pinned = PinnedMemory(device_of(device), nbytes, what="for the benchmark")
    source = pinned.bytes(0, nbytes).fill_(1)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(REPEATS):
        gpu.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        gpu.synchronize()
        best = max(best, nbytes / (time.perf_counter() - start))
    return {"bytes_per_s": best, "is_pinned": pinned.is_pinned, "device": gpu.name}


# -- BERT -------------------------------------------------------------------------------------------------------------


def bert(task: Task, config: BertConfig, weights: Path) -> dict[str, Any]:
    """As the benchmark of 2022 did: the peak of torch's allocator in a forward of 512 tokens."""
    report, device = Report(), gpu_device.gpu.device
    embedding = "embeddings.word_embeddings"
    model: nn.Module
    if task.variant == "kept embedding":
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model = BertModel(config)
        kept = model.get_submodule(embedding)
        with pylomin_store(weights) as values:
            kept.load_state_dict({"weight": values(f"{embedding}.weight")}, assign=True)
        model = pylomin.lazy_loading(model, weights=weights, skip_modules=[kept], device=device)
    else:
        model = pylomin.load(lambda: BertModel(config), weights, device=device)
    if task.variant == "resident":
        model = pylomin.restore(model)
    if task.variant.startswith("chunked"):
        model = pylomin.chunked_embedding(model, target_module_name=embedding, chunk_size=2048)
    if "tiles" in task.variant:
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        model = pylomin.chunked_linear(model, target_modules=linears, chunk_size=TILE_ROWS)
    if "prefetch" in task.variant:
        model = pylomin.prefetch(model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (task.batch, BERT_TOKENS), generator=generator).to(device)
    return _measured(report, task, model.eval(), lambda: model(tokens).last_hidden_state, weights.parent)


@contextmanager
def pylomin_store(weights: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """Read single weights of a file."""
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        yield lambda name: file.get_tensor(name).clone()


# -- Llama ------------------------------------------------------------------------------------------------------------


def decoder(task: Task, config: LlamaConfig, weights: Path) -> nn.Module:
    """The model, run as the task says."""
    nbytes = size_of(config)
    spare_bytes = min(16 << 20, nbytes // 8)  # for the window
    budget = None if task.budget_share is None else int(task.budget_share * nbytes) + spare_bytes

    device = gpu_device.gpu.device

    def build() -> nn.Module:
        return llama(config)

    if task.variant == "resident":
        return pylomin.restore(pylomin.load(build, weights, device=device))
    if task.variant == "pylomin" and task.storage == "disk":
        return pylomin.prefetch(pylomin.load(build, weights, device=device, memory_budget=budget))
    if task.variant == "accelerate disk_offload":
        from accelerate import disk_offload

        model = empty(config).to(DTYPE)
        disk_offload(model, str(weights.parent / "accelerate"), execution_device=device)
        return model
    model = pylomin.restore(pylomin.load(build, weights))
    if task.variant == "pylomin":
        offloaded = pylomin.lazy_loading(model, device=device, storage="cpu", memory_budget=budget)
        return pylomin.prefetch(offloaded)
    if task.variant == "accelerate cpu_offload":
        from accelerate import cpu_offload

        cpu_offload(model, execution_device=device)
        return model
    from diffusers.hooks.group_offloading import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=True,
    )
    return model


def generate(task: Task, config: LlamaConfig, weights: Path, size: str) -> dict[str, Any]:
    """Prefill of a long prompt, or tokens one by one."""
    report = Report()
    model = decoder(task, config, weights).eval()
    generator = torch.Generator().manual_seed(1)
    count = PREFILL_TOKENS[size] if task.work == "prefill" else PROMPT_TOKENS
    prompt = torch.randint(config.vocab_size, (1, count), generator=generator).to(gpu_device.gpu.device)
    if task.work == "prefill":

        def whole() -> torch.Tensor:
            logits: torch.Tensor = model(prompt, use_cache=False, logits_to_keep=1).logits
            return logits

        return _measured(report, task, model, whole, weights.parent)
    state: dict[str, Any] = {"cache": None, "tokens": prompt}

    def step() -> torch.Tensor:
        output = model(state["tokens"], past_key_values=state["cache"], use_cache=True, logits_to_keep=1)
        state["cache"], state["tokens"] = output.past_key_values, output.logits[:, -1:].argmax(-1)
        logits: torch.Tensor = output.logits
        return logits

    return _measured(report, task, model, step, weights.parent)


def _measured(
    report: Report, task: Task, model: nn.Module, run: Callable[[], torch.Tensor], directory: Path
) -> dict[str, Any]:
    with torch.inference_mode():
        output = synchronized(run)()
        for _ in range(WARM_UP_TOKENS):
            synchronized(run)()
        gpu_device.gpu.reset_peak()
        report.passes(synchronized(run), DECODED_TOKENS, model)
    fields = report.fields
    fields["finished_s"] = time.time()
    fields["peak_device_bytes"] = gpu_device.gpu.peak_bytes()
    try:
        stats = pylomin.stats(model)
    except pylomin.PassError:  # nothing of it is offloaded by us
        pass
    else:
        fields["ledger_peak_bytes"] = stats.peak_bytes
        fields["pinned_bytes"] = stats.pinned_bytes
        if stats.memory_budget is not None:
            fields["budget_bytes"] = stats.memory_budget
    reference = directory / f"{task.work.replace(' ', '-')}.safetensors"
    report.compare(output.float().cpu(), reference, is_reference=task.variant == "resident")
    return fields


# -- the timeline -----------------------------------------------------------------------------------------------------


class Timeline:
    """When copies and layers ran, by events of the device."""

    def __init__(self, model: nn.Module) -> None:
        self._gpu = gpu_device.gpu
        self._base: Any = None
        self._copies: list[tuple[Any, Any]] = []
        self._layers: list[tuple[Any, Any]] = []
        self._begun: list[Any] = []
        self._model = model

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch copies to any device, and layers of the model."""
        now = self._gpu.now
        layers = self._model.get_submodule("model.layers").children()
        hooks = []
        for layer in layers:
            hooks.append(layer.register_forward_pre_hook(lambda *_: self._begun.append(now())))
            hooks.append(layer.register_forward_hook(lambda *_: self._layers.append((self._begun.pop(), now()))))
        kind: Any = type(device_of(self._gpu.device))
        copy = kind.copy

        def timed(device: Device, target: torch.Tensor, source: torch.Tensor) -> None:
            begin = now()
            copy(device, target, source)
            self._copies.append((begin, now()))

        kind.copy = timed
        self._base = now()
        try:
            yield
        finally:
            kind.copy = copy
            for hook in hooks:
                hook.remove()
        self._gpu.synchronize()

    def intervals(self) -> tuple[list[Interval], list[Interval]]:
        """Milliseconds since the start: copies, layers."""

        def of(events: list[tuple[Any, Any]]) -> list[Interval]:
            between = self._gpu.ms_between
            return [(between(self._base, begin), between(self._base, end)) for begin, end in events]

        return of(self._copies), of(self._layers)


def timeline(task: Task, config: LlamaConfig, weights: Path, size: str) -> dict[str, Any]:
    """One prefill, seen by events."""
    model = decoder(task, config, weights).eval()
    prompt = torch.ones(1, PREFILL_TOKENS[size], dtype=torch.int64, device=gpu_device.gpu.device)
    watched = Timeline(model)
    with torch.inference_mode():
        for _ in range(3):
            synchronized(lambda: model(prompt, use_cache=False, logits_to_keep=1))()
        with watched.recording():
            model(prompt, use_cache=False, logits_to_keep=1)
    copies, layers = watched.intervals()
    return {"copies_ms": copies, "layers_ms": layers}
