"""A user's reward function: found by name, and called with what its parameters ask for."""

import asyncio
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection
from typing import Any, cast

import numpy as np

from learner.environments.rewards.base import Reading, RewardItem
from learner.environments.rewards.descriptions import described
from learner.environments.rewards.worker_process import Loaded
from learner.run.errors import InputError

IN_ORDER = ("prompt", "response", "answer")
OFFERED = (*IN_ORDER, "prompt_id", "sample", "finish_reason", "token_ids", "row")
"""What a function may ask for by name, besides the columns of the data set. These win over columns of their name."""

Parameter = inspect.Parameter
_BY_PLACE = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def load_function(name: str, columns: Collection[str] | None) -> Loaded:
    """The user's `module:function` as one that takes a `RewardItem`. `columns`: those of the data; None: not known.

    Modules in the working directory are found, as with `python -m`. Raises InputError that says what is missing, or
    what the function asks for that there is not.
    """
    function = _find(name)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        # Some callables of C libraries have no signature.
        reading = Reading(frozenset(), f"{', '.join(IN_ORDER)}, in this order")
        return Loaded(lambda item: _awaited(function(item.prompt, item.response, item.answer)), reading)
    in_order = _takes_three_in_order(parameters, columns)
    by_place = [p for p in parameters if p.kind in _BY_PLACE][: len(IN_ORDER)] if in_order else []
    named = _names(name, [p for p in parameters if p not in by_place], columns)
    takes_rest = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)

    def call(item: RewardItem) -> Any:
        offered = dict(item.row) | {key: getattr(item, key) for key in OFFERED}
        if isinstance(item.token_ids, np.ndarray):
            offered["token_ids"] = item.token_ids.tolist()
        first = [offered.pop(key) for key in IN_ORDER] if in_order else []
        # A column that a row of JSON lines lacks leaves a parameter at its default, or None.
        given = {key: offered.pop(key, None) for key, optional in named.items() if key in offered or not optional}
        rest = offered if takes_rest else {}
        return _awaited(function(*first, **given, **rest))

    own = frozenset(named) - frozenset(OFFERED)
    if columns is not None:
        own &= frozenset(columns)
    first = (f"{', '.join(IN_ORDER)} in this order",) if in_order else ()
    rest = ("all there is by name",) if takes_rest else ()
    reads_all = takes_rest or "row" in named
    reads_tokens = takes_rest or "token_ids" in named
    text = ", ".join((*first, *named, *rest)) or "nothing"
    return Loaded(call, Reading(None if reads_all else own, text, reads_tokens))


def _find(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"there is no module {error.name!r} in the working directory or on the Python path") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"module {module_name!r} fails to import: {described(error)}") from error
    function: Any = getattr(module, attribute, None)
    if function is None:
        own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__}
        functions = [key for key, value in own.items() if callable(value) and key[0] != "_"]
        raise InputError(
            f"module {module_name!r} has no {attribute!r}; it has {', '.join(functions) or 'no functions'}"
        )
    if not callable(function):
        raise InputError(f"{attribute!r} of module {module_name!r} is a {type(function).__name__}, no function")
    return cast(Callable[..., Any], function)


def _takes_three_in_order(parameters: list[Parameter], columns: Collection[str] | None) -> bool:
    """Whether prompt, response and answer come in this order, because some of the first three names mean nothing here.

    Not if one of them means something else than its place: that is a function by name with a misspelt parameter.
    """
    by_place = [p for p in parameters if p.kind in _BY_PLACE]
    if any(p.kind is Parameter.VAR_POSITIONAL for p in parameters) and len(by_place) < len(IN_ORDER):
        return True
    first = by_place[: len(IN_ORDER)]
    known = all(
        p.kind is not Parameter.POSITIONAL_ONLY
        and (p.name in OFFERED or p.name in (columns or ()) or p.default is not p.empty)
        for p in first
    )
    misplaced = any(p.name in OFFERED and p.name != place for p, place in zip(first, IN_ORDER, strict=False))
    return len(first) == len(IN_ORDER) and not known and not misplaced


def _names(name: str, parameters: list[Parameter], columns: Collection[str] | None) -> dict[str, bool]:
    """The parameters that are given by name, each with whether it has a default."""
    named = {}
    for parameter in parameters:
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            continue
        has_default = parameter.default is not parameter.empty
        if parameter.kind is Parameter.POSITIONAL_ONLY:
            raise InputError(f"{name} takes {parameter.name!r} by its place only; give it a name, without /")
        if parameter.name in OFFERED or columns is None or parameter.name in columns:
            named[parameter.name] = has_default
        elif not has_default:
            raise InputError(
                f"{name} asks for {parameter.name!r}, which there is not; there is {', '.join(OFFERED)}"
                + (f", and the columns {', '.join(sorted(columns))}" if columns else ", and the data has no columns")
            )
    return named


def _awaited(value: Any) -> Any:
    """A function may be asynchronous: its coroutine runs to its end here, within the call's time limit."""
    return asyncio.run(value) if inspect.iscoroutine(value) else value
