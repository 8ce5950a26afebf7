"""Checking options by name and type against the signature of the constructor that will receive them.

One rule for the options of every mixer and of Resona: a name that the constructor does not have, or a value of
another type, is one clear error before anything is built.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError


def accepted_options(constructor: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a constructor: what a configuration may set."""
    parameters = inspect.signature(constructor).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(constructor: Callable, options: dict[str, Any], owner: str) -> None:
    """Raise ValueError unless every option is a keyword-only parameter of `constructor` with the right type.

    Args:
        constructor: a class; its keyword-only parameters and their annotations are what is allowed.
        options: name to value, as read from JSON or YAML.
        owner: how the error names the receiver, such as "mixer 'gla'".

    Raises:
        ValueError: unknown name (the nearest one is suggested), or a value of another type.
    """
    accepted = accepted_options(constructor)
    hints = typing.get_type_hints(constructor.__init__)
    if not isinstance(options, dict):
        raise ValueError(f"{owner}: options must be a mapping of names to values, got {options!r}")
    for name, value in options.items():
        if name not in accepted:
            raise ValueError(f"{owner} has no option {name!r}{did_you_mean(name, accepted)}; "
                             f"allowed: {', '.join(accepted)}")
        check_type(value, hints[name], f"{owner}: option {name!r}", accepted[name].annotation)


def check_type(value: Any, hint: Any, what: str, shown: str) -> None:
    """Raise ValueError unless `value` is what the type hint says; a whole number passes for a float, text never.

    Args:
        what: how the error names the value.
        shown: how it names the type.
    """
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        raise ValueError(f"{what} must be {shown}, got {value!r} ({type(value).__name__})") from None


def check_names(what: str, given: typing.Iterable[str], allowed: typing.Collection[str]) -> None:
    """Raise ValueError for the first name that is not allowed; `what` is how the error names the place."""
    for name in given:
        if name not in allowed:
            raise ValueError(f"{what} has an unknown name {name!r}{did_you_mean(name, allowed)}; "
                             f"allowed: {', '.join(sorted(allowed))}")


def did_you_mean(name: str, allowed: typing.Iterable[str]) -> str:
    """' (did you mean ...?)' for the nearest allowed name, or an empty string."""
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
