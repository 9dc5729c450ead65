"""``from_pretrained``: a transformers model whose weights stay in the directory that they were saved in."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pylomin.errors import PassError, WeightMismatchError, WeightNotFoundError
from pylomin.io.sizes import parse_bytes
from pylomin.lazy.distributed import local_of, mesh_device
from pylomin.pretrained.attach import offload_deferred
from pylomin.pretrained.checkpoint import checkpoint_directory, open_checkpoint
from pylomin.pretrained.config import (
    check_class,
    check_transformers,
    distributed_config_of,
    read_config,
    read_generation_config,
    refuse_quantized,
)
from pylomin.pretrained.deferred import DeferredTensor
from pylomin.residency.device import execution_device

_DOWNLOADING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")  # nothing to do
_REFUSED = {
    "device_map": "give device=, and memory_budget= for what may be in its memory",
    "max_memory": "give memory_budget=",
    "offload_folder": "the weights stay where they are, and nothing is written",
    "quantization_config": "quantised models are not supported",
    "gguf_file": "GGUF files are opened by pylomin.open_store",
    "state_dict": "use pylomin.load(lambda: Model(config), state_dict)",
    "device_mesh": "transformers makes the mesh of all processes, as distributed_config says",
    "trust_remote_code": "no code of a checkpoint is run; import its model class and give that",
}


def from_pretrained(
    model_class: Any,
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    memory_budget: int | str | None = None,
    **kwargs: Any,
) -> Any:
    """The model that ``model_class.from_pretrained(path)`` makes, whose weights stay where they are stored.

    transformers itself builds the model, finds which stored tensor is which weight, and ties, renames and initialises,
    but it is given tensors that have not been read. Experts that are stored one by one and stacked by the model are
    read one by one. A weight that is converted in another way (transposed, permuted) is computed by each read of it.

    Args:
        model_class: of transformers: ``AutoModelForCausalLM``, ``BertModel``.
        path: a local directory that ``save_pretrained`` made; ``.safetensors`` or ``.bin``, in one file or several.
        device: where to compute. Default: the CPU.
        dtype: of the model: a floating-point dtype, its name, or ``"auto"`` for what the config says, else the
            weights. Default: ``"auto"``.
        memory_budget: as in :func:`pylomin.lazy_loading`.
        **kwargs: as for ``model_class.from_pretrained``: changes to the config, ``attn_implementation``,
            ``generation_config``, ``ignore_mismatched_sizes``, ``key_mapping``, ``variant``, ``subfolder``,
            ``output_loading_info`` (returns the model and what did not match), ``distributed_config`` (or ``tp_plan``
            and ``tp_size``): each process opens the same checkpoint and reads its own shards.

    Returns:
        The model in eval mode. Weights that the checkpoint lacks, such as a new head's, are initialised as
        transformers does, stay in memory and may be trained; those, and stored ones without a use, are in the report
        that transformers logs.

    Raises:
        MissingPackageError: transformers is missing or older than 5.
        StoreReadError: the directory, its config or its weights are not there.
        WeightNotFoundError: no weight of the checkpoint is one of the model's.
        WeightMismatchError: weights have other shapes than the model's.
        PassError: an argument, a class or a checkpoint that this cannot work with.
        BudgetError: ``memory_budget`` is smaller than the largest group of weights used together.
    """
    check_transformers()
    check_class(model_class)
    for name, reason in _REFUSED.items():
        if kwargs.get(name):
            raise PassError(f"from_pretrained does not take {name}: {reason}.")
        kwargs.pop(name, None)
    for name in _DOWNLOADING:
        kwargs.pop(name, None)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    compute_device = execution_device(device)
    distributed = distributed_config_of(kwargs)
    former_dtype = kwargs.pop("torch_dtype", None)
    dtype = _parse_dtype(former_dtype if dtype is None else dtype)
    subfolder = kwargs.pop("subfolder", "")
    variant, use_safetensors = kwargs.pop("variant", None), kwargs.pop("use_safetensors", None)
    wants_info = kwargs.pop("output_loading_info", False)

    directory = checkpoint_directory(path, subfolder)
    model_class, config, model_kwargs = read_config(model_class, directory, kwargs)
    refuse_quantized(config, directory)
    stores = open_checkpoint(
        directory,
        file_name=getattr(config, "transformers_weights", None),
        extra_files=getattr(type(config), "extra_files", ()),
        variant=variant,
        use_safetensors=use_safetensors,
    )
    tensors = {name: DeferredTensor.of(store, name) for store in stores for name in store}
    try:
        with _report() as report:
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                **model_kwargs,
                **({} if distributed is None else {"distributed_config": distributed}),
            )
    except RuntimeError as error:
        problem = WeightMismatchError if "ignore_mismatched_sizes" in str(error) else PassError
        details = "\n".join(report) or str(error)
        raise problem(f"transformers cannot load {directory!r} into {model_class.__name__}: {details}") from error
    tensors_of_model = map(local_of, itertools.chain(model.parameters(), model.buffers()))
    if tensors and not any(isinstance(tensor, DeferredTensor) for tensor in tensors_of_model):
        raise WeightNotFoundError(
            f"no weight in {directory!r} is one of {type(model).__name__}'s: found {next(iter(tensors))!r} and "
            f"{len(tensors) - 1} more, expected {next(iter(model.state_dict()))!r} and others. Give the class that "
            f"the checkpoint was saved from: its config.json names {getattr(config, 'architectures', None)}."
        )
    compute_device = mesh_device(model.parameters(), compute_device)
    offload_deferred(model, device=compute_device, memory_budget=budget)
    model.config.name_or_path = model.name_or_path = os.fspath(path)
    if hasattr(model, "adjust_generation_fn") and kwargs.get("generation_config") is None:
        read_generation_config(model, directory, kwargs)
    return (model, info) if wants_info else model


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None or dtype == "auto":
        return "auto"
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PassError(f"dtype is {dtype!r}; expected a floating-point dtype, its name, or 'auto'.")
    return found


class _Collected(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()))


@contextmanager
def _report() -> Iterator[list[str]]:
    """What transformers logs of a load, which its errors refer to; also where the user's verbosity is lower."""
    handler = _Collected()
    logger = logging.getLogger("transformers.modeling_utils")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    if not logger.isEnabledFor(logging.WARNING):
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
