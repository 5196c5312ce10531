"""``python:MODULE:NAME``: a backbone that the user's own code makes."""

from __future__ import annotations

import importlib

from samething.backbones.network import Backbone
from samething.errors import InputError


def python_backbone(identifier: str) -> Backbone:
    """The backbone that ``MODULE:NAME`` is, or returns when it is called without arguments.

    Raises:
        InputError: there is no such module or name, or what it gives is not a :class:`Backbone`.
    """
    module_name, _, attribute = identifier.partition(":")
    given = f"backbone 'python:{identifier}'"
    expected = "python:MODULE:NAME, a samething.backbones.Backbone or a function that returns one"
    if not module_name or not attribute:
        raise InputError(given, expected=expected, next_step="name the module and what stands in it")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{given}: {error}",
            expected=expected,
            next_step="install the package, or put its folder into PYTHONPATH",
        ) from error
    found = getattr(module, attribute, None)
    if callable(found) and not isinstance(found, Backbone):
        found = found()
    if not isinstance(found, Backbone):
        raise InputError(
            f"{given}: {attribute} in {module_name} is {type(found).__name__}",
            expected=expected,
            next_step="wrap the network: Backbone(network, name=..., width=..., preprocessing=...)",
        )
    return found
