"""Which modules a pass works on. Pure: decides, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from torch import nn

from pylomin.errors import PassError

ModuleT = TypeVar("ModuleT", bound=nn.Module)
"""A pass returns the very object that it was given."""


def check_model(model: object) -> None:
    """Raises TypeError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as the first argument, found {type(model).__name__}.")


def select_modules(
    model: nn.Module,
    *,
    target_classes: Iterable[type[nn.Module]] | None = None,
    target_modules: Iterable[nn.Module] | None = None,
    skip_modules: Iterable[nn.Module] | None = None,
) -> list[nn.Module]:
    """The modules of ``model`` that are targets and are not skipped, in the model's order.

    Args:
        target_classes: classes whose instances are targets; None means no choice by class.
        target_modules: these modules themselves, not what is below them; None means no choice by module.
        skip_modules: these modules and everything below them are never targets.

    Without either kind of target, every module is one; with both, the modules that match at least one.

    Raises:
        TypeError: something in an argument has the wrong type.
        PassError: a module in an argument is no part of the model.
    """
    inside = list(model.modules())
    classes = None if target_classes is None else _checked(target_classes, "target_classes", type)
    modules = None if target_modules is None else _checked(target_modules, "target_modules", nn.Module)
    skipped = [] if skip_modules is None else _checked(skip_modules, "skip_modules", nn.Module)
    known = set(inside)
    for argument, members in (("target_modules", modules or []), ("skip_modules", skipped)):
        for module in members:
            if module not in known:
                raise PassError(
                    f"{argument} contains a {type(module).__name__} that is no part of the model. Take the modules "
                    "from model.modules() of the very model that is passed."
                )
    never = {below for module in skipped for below in module.modules()}
    if classes is None and modules is None:
        return [module for module in inside if module not in never]
    wanted = set(modules or [])
    of_class = tuple(classes or ())
    return [m for m in inside if m not in never and (m in wanted or isinstance(m, of_class))]


def named_or_given(
    model: nn.Module, target_module_name: str | None, target_modules: Iterable[nn.Module] | None, *, choices: str
) -> list[nn.Module]:
    """The module of that name, or the modules in the other argument.

    Raises:
        TypeError: something in an argument has the wrong type.
        PassError: both arguments or none, nothing in them, or no part of the model; ends with ``choices``.
    """
    if (target_module_name is None) == (target_modules is None):
        raise PassError(f"give either target_module_name or target_modules. {choices}")
    if target_module_name is None:
        found = select_modules(model, target_modules=target_modules)
        if not found:
            raise PassError(f"target_modules is empty. {choices}")
        return found
    try:
        return [model.get_submodule(target_module_name)]
    except AttributeError:
        similar = get_close_matches(target_module_name, [name for name, _ in model.named_modules()], n=1)
        hint = f" (similar: '{similar[0]}')" if similar else ""
        raise PassError(f"the model has no module '{target_module_name}'{hint}. {choices}") from None


def _checked(items: Iterable[object], argument: str, kind: type) -> list[Any]:
    if isinstance(items, (str, nn.Module)) or not isinstance(items, Iterable):
        raise TypeError(
            f"{argument} is a {type(items).__name__}; expected a list, tuple, set or generator of "
            f"{'classes' if kind is type else 'modules'}."
        )
    found = list(items)
    for item in found:
        if not isinstance(item, kind) or (isinstance(item, type) and not issubclass(item, nn.Module)):
            raise TypeError(
                f"{argument} contains {item!r}; expected "
                f"{'subclasses of torch.nn.Module' if kind is type else 'modules'} only."
            )
    return found
