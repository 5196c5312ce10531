"""Configurations are frozen dataclasses: how they are changed, read from a file and shown as options.

The same names serve everywhere. A field ``batch_size`` is the keyword ``batch_size=64`` of the function, the
option ``--batch-size 64`` of the command, and the line ``batch_size = 64`` of the file behind ``--config``.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
from cyclopts import Group, Parameter

from samething.errors import InputError

Config = TypeVar("Config")
Function = TypeVar("Function", bound=Callable[..., Any])


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration with some fields changed.

    Args:
        config: a dataclass.
        changes: values by name; lists stand for tuples, whole numbers for numbers, as in JSON and TOML.

    Raises:
        InputError: a name that is no field, or a value of another kind.
    """
    (own,) = divided(changes, type(config))
    hints = get_type_hints(type(config))
    values = {name: _fitted(name, value, hints[name]) for name, value in own.items()}
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def divided(changes: Mapping[str, Any], *kinds: type[Any]) -> list[dict[str, Any]]:
    """The changes that belong to each kind of configuration.

    Raises:
        InputError: a name that none of them has; says which one is nearest.
    """
    names = [{field.name for field in dataclasses.fields(kind)} for kind in kinds]
    known = sorted(set().union(*names))
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"unknown option {name}",
                expected=f"one of {', '.join(known)}",
                next_step=f"perhaps {near[0]} was meant" if near else "leave it out",
            )
    return [{name: value for name, value in changes.items() if name in own} for own in names]


def read_config(path: Path) -> dict[str, Any]:
    """The changes that a TOML file asks for, by name.

    Raises:
        InputError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"--config {path}: {error}",
            expected="a TOML file with lines such as batch_size = 64",
            next_step="correct the file, or leave --config out",
        ) from error


def check_ranges(config: Any, ranges: Sequence[tuple[str, int | float, int | float, str]]) -> None:
    """Refuse numbers out of their range, and bring whole numbers in fields of type float to floats.

    Args:
        config: a frozen dataclass, from its ``__post_init__``.
        ranges: name, least and largest value, and both in words.

    Raises:
        InputError: a value out of its range.
    """
    for field in dataclasses.fields(config):
        if field.type == "float":  # 20 and 20.0 are the same run
            object.__setattr__(config, field.name, float(getattr(config, field.name)))
    for name, low, high, words in ranges:
        value = getattr(config, name)
        if not low <= value <= high:
            flag = _flag(name)
            raise InputError(f"{flag} {value}", expected=words, next_step=f"give another {flag}")


def with_options(
    *kinds: type[Any], groups: Mapping[str, Sequence[str]], defaults: bool = False
) -> Callable[[Function], Function]:
    """Show fields of configurations as options of a command; its function takes them as ``**changes``.

    Args:
        kinds: dataclasses, each field with a sentence below it.
        groups: title of each group of options, and the fields that it shows. Fields that no group shows are
            for Python and for the file given with ``--config``.
        defaults: say the fields' defaults, where no recipe sets others.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        sentences = {name: sentence for name, _, sentence in fields_of(*kinds)}
        if defaults:
            known = {
                name: value
                for name, value, _ in fields_of(*kinds)
                if value not in (None, ()) and value is not False
            }
            sentences |= {name: f"{sentences[name]} [default: {value}]" for name, value in known.items()}
        for place, (title, names) in enumerate(groups.items(), start=1):
            group = Group(title, sort_key=place)
            for name in names:
                shown = Parameter(help=sentences[name], group=group, show_default=False, negative=())
                hint: Any = Annotated[(hints[name] | None, shown)]
                parameters.append(
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
                )
        # the parser evaluates annotations: a result's class may need torch, and a command knows files only
        function.__annotations__.pop("return", None)
        function.__annotations__["config"] = Path | None
        function.config_kinds = kinds  # type: ignore[attr-defined]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate


def fields_of(*kinds: type[Any]) -> list[tuple[str, Any, str]]:
    """Name, default and sentence of every field, in order."""
    return [
        (each.arg_name, getattr(plain, each.arg_name), each.description or "")
        for plain in (kind() for kind in kinds)
        for each in docstring_parser.parse_from_object(type(plain)).params
    ]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _fitted(name: str, value: Any, hint: Any) -> Any:
    """The value as the field has it.

    Raises:
        InputError: it is of another kind.
    """
    for kind in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        origin, inner = get_origin(kind) or kind, get_args(kind)
        if origin is Literal and value in inner:
            return value
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(_fitted(name, each, inner[0]) for each in value)
        if origin is Path and isinstance(value, str | Path):
            return Path(value)
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if origin is dict and isinstance(value, Mapping):
            return {key: _fitted(f"{name}.{key}", each, inner[1]) for key, each in value.items()}
        if origin in (bool, str, type(None)) and isinstance(value, origin):
            return value
    choices = ", ".join(map(str, get_args(hint))) if get_origin(hint) is Literal else None
    raise InputError(
        f"{_flag(name)} {value}",
        expected=f"one of {choices}" if choices else inspect.formatannotation(hint),
        next_step=f"give another {_flag(name)}",
    )
