"""A host's contract as it was when a plug-in was tested with it: methods and their parameters.

Recorded from the host where it is installed, and kept as JSON, so that the tests of a plug-in find
out without its host whether it takes every call, and with it whether the host has changed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Recorded = dict[str, list[dict[str, Any]]]
"""By method: its parameters after ``self``, each with name, kind and whether it has a default."""

_VARIADIC = ("VAR_POSITIONAL", "VAR_KEYWORD")


def record(cls: type, names: Iterable[str]) -> Recorded:
    """The parameters of the methods ``names`` of ``cls``."""
    return {name: _parameters(inspect.getattr_static(cls, name)) for name in sorted(names)}


def _parameters(method: Any) -> list[dict[str, Any]]:
    function = method.__func__ if isinstance(method, (staticmethod, classmethod)) else method
    if isinstance(function, property):
        return []
    parameters = list(inspect.signature(function).parameters.values())
    if not isinstance(method, staticmethod):
        parameters = parameters[1:]
    return [
        {
            "name": parameter.name,
            "kind": parameter.kind.name,
            "default": parameter.default is not inspect.Parameter.empty,
        }
        for parameter in parameters
    ]


def load(path: Path) -> dict[str, Recorded]:
    """What was recorded, by the name of the class."""
    recorded: dict[str, Recorded] = json.loads(path.read_text())
    return recorded


def save(path: Path, recorded: dict[str, Recorded]) -> None:
    """Writes what :func:`load` reads."""
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


def accepts(ours: type, recorded: Recorded) -> list[str]:
    """Which calls that ``recorded`` allows ``ours`` does not take; empty if it takes all."""
    refused = []
    for name, parameters in recorded.items():
        method = inspect.getattr_static(ours, name, None)
        if method is None:
            refused.append(f"{name}: there is no such method")
            continue
        if isinstance(method, property):
            continue
        function = method.__func__ if isinstance(method, (staticmethod, classmethod)) else method
        signature = inspect.signature(function)
        self_ = () if isinstance(method, staticmethod) else (None,)
        for args, kwargs in _calls(parameters):
            try:
                signature.bind(*self_, *args, **kwargs)
            except TypeError as wrong:
                refused.append(f"{name}{(*args, *kwargs)}: {wrong}")
    return refused


def _calls(
    parameters: list[dict[str, Any]],
) -> Iterable[tuple[tuple[str, ...], dict[str, str]]]:
    """With all parameters by position where that may be, with all by name, and with those alone
    that have no default."""
    plain = [p for p in parameters if p["kind"] not in _VARIADIC]
    for chosen in (plain, [p for p in plain if not p["default"]]):
        for by_name in (False, True):
            args = []
            kwargs = {}
            for parameter in chosen:
                name, kind = parameter["name"], parameter["kind"]
                if kind == "POSITIONAL_ONLY" or (kind == "POSITIONAL_OR_KEYWORD" and not by_name):
                    args.append(name)
                else:
                    kwargs[name] = name
            yield tuple(args), kwargs
