"""Of which class a transformers model is, and with which config."""

from __future__ import annotations

import os
from typing import Any

from pylomin.errors import MissingPackageError, PassError

_MIN_TRANSFORMERS = 5  # earlier ones read a given state dict while they copy it


def check_transformers() -> None:
    """Raises MissingPackageError unless transformers can be imported and is new enough."""
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            f"pylomin.from_pretrained needs transformers: pip install 'pylomin[transformers]'. ({error})"
        ) from error
    found = str(transformers.__version__)
    if int(found.partition(".")[0]) < _MIN_TRANSFORMERS:
        raise MissingPackageError(
            f"pylomin.from_pretrained needs transformers {_MIN_TRANSFORMERS} or later; found {found}. Upgrade it: "
            "pip install -U 'pylomin[transformers]'."
        )


def check_class(model_class: Any) -> None:
    """Raises PassError unless it is a model class of transformers, perhaps an auto class."""
    from transformers import PreTrainedModel

    is_concrete = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    if _is_auto(model_class) or (is_concrete and model_class.config_class is not None):
        return
    given = model_class.__name__ if isinstance(model_class, type) else f"an object of {type(model_class).__name__}"
    raise PassError(
        f"model_class is {given}; expected a model class of transformers, such as AutoModelForCausalLM or BertModel. "
        "For models of other libraries: pylomin.load(lambda: Model(config), path), or pylomin.lazy_loading(model)."
    )


def read_config(model_class: Any, directory: str, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The class that an auto class stands for, the config, and the arguments that are not for it.

    Raises:
        PassError: transformers cannot read the config, or the auto class has no model for it.
    """
    from transformers import AutoConfig

    others = {name: value for name, value in kwargs.items() if name != "config"}
    config = kwargs.get("config")
    if config is None or isinstance(config, (str, os.PathLike)):
        config_class = AutoConfig if _is_auto(model_class) else model_class.config_class
        implementations = {name: value for name, value in others.items() if name.endswith("_implementation")}
        try:
            config, others = config_class.from_pretrained(
                config or directory, return_unused_kwargs=True, local_files_only=True, **others
            )
        except (OSError, ValueError, KeyError) as error:
            raise PassError(f"transformers cannot read the config in {directory!r}: {error}") from error
        others |= implementations
    if _is_auto(model_class):
        model_class, config = _concrete(model_class, config, directory)
    return model_class, config, others


def _is_auto(model_class: Any) -> bool:
    return hasattr(model_class, "_model_mapping")


def _concrete(auto_class: Any, config: Any, directory: str) -> tuple[Any, Any]:
    """What ``auto_class.from_pretrained`` would choose, without code from the checkpoint's directory."""
    from transformers.models.auto.auto_factory import _get_model_class

    if type(config) not in auto_class._model_mapping:
        raise PassError(
            f"{auto_class.__name__} has no model for a {type(config).__name__}, which is what {directory!r} has. Its "
            f"config.json names {getattr(config, 'architectures', None)}; give that class, or an auto class for it."
        )
    model_class = _get_model_class(config, auto_class._model_mapping)
    text_config_class = config.sub_configs.get("text_config")
    if text_config_class is not None and model_class.config_class == text_config_class:
        return model_class, config.get_text_config()
    return model_class, config


def distributed_config_of(kwargs: dict[str, Any]) -> Any | None:
    """Take how the model is distributed out of the arguments; None where it is not.

    Raises:
        PassError: it is sharded by FSDP, too; or given twice.
    """
    config = kwargs.pop("distributed_config", None)
    standalone = {name: kwargs.pop(name, None) for name in ("tp_plan", "tp_size")}
    given = {name: value for name, value in standalone.items() if value is not None}
    if config is None and not given:
        return None
    from transformers.distributed import DistributedConfig

    if config is None:
        config = DistributedConfig(**given)
    elif given:
        raise PassError(f"give either distributed_config or {' and '.join(given)}, as arguments of DistributedConfig.")
    elif isinstance(config, dict):
        config = DistributedConfig.from_dict(config)
    if config.dp_size > 1:
        raise PassError(
            "distributed_config shards the model by FSDP (fsdp_size, dp_replicate_size), which keeps parameters in "
            "memory of its own. Give tp_size and ep_size only, and read other samples in each group of processes."
        )
    return config


def read_generation_config(model: Any, directory: str, kwargs: dict[str, Any]) -> None:
    """Give ``model`` the generation config in ``directory``, else what the model's config says of it."""
    for_hub = dict.fromkeys(("cache_dir", "proxies", "token", "revision", "trust_remote_code"))
    changes = {name: value for name, value in kwargs.items() if not name.endswith("_implementation")}
    model.adjust_generation_fn(
        None, False, None, directory, force_download=False, local_files_only=True, subfolder="", **for_hub, **changes
    )


def refuse_quantized(config: Any, directory: str) -> None:
    """Raises PassError if the weights are quantised in a way that needs kernels of another library."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise PassError(
            f"the weights in {directory!r} are quantised (quantization_config with quant_method {str(method)!r}), "
            "which pylomin cannot run. Use the checkpoint that this one was made from."
        )
