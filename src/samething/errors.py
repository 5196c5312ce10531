"""The errors a user can meet: each says what was given, what was expected and what to do next.

The library raises; only the command line turns an error into an exit status.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, Final


class SamethingError(Exception):
    """Something the user can mend.

    Args:
        given: what was found, with the value or the path in the user's own spelling.
        expected: what would have been right.
        next_step: what to type or change to go on.
    """

    def __init__(self, given: str, *, expected: str, next_step: str) -> None:
        self.given = given
        self.expected = expected
        self.next_step = next_step
        super().__init__(f"{given}\n  expected: {expected}\n  next: {next_step}")

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only arguments do not survive pickling by default, and worker processes send errors home
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(kind: type[SamethingError], args: tuple[str, ...], state: dict[str, object]) -> SamethingError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class InputError(SamethingError):
    """An argument, a table or an image that cannot be used as it is."""


class ImageError(InputError):
    """One image that cannot be read; jobs list it with its reason and go on.

    Args:
        given: name and reason in one sentence.
        reason: the reason alone, for lists that name the image beside it; by default the sentence.
        expected: what would have been right.
        next_step: what to do to go on.
    """

    def __init__(self, given: str, *, expected: str, next_step: str, reason: str | None = None) -> None:
        super().__init__(given, expected=expected, next_step=next_step)
        self.reason = given if reason is None else reason

    @classmethod
    def of(cls, name: str, reason: str, *, expected: str, next_step: str) -> ImageError:
        """The error of a named image, whose reason goes on from the name: ``is empty``, ``: cut off``."""
        bare = reason.removeprefix(": ")
        joint = "" if reason.startswith(":") else " "
        return cls(f"{name}{joint}{reason}", expected=expected, next_step=next_step, reason=bare)


class ArtefactError(SamethingError):
    """A catalog, feature, run, model or index folder that is missing, unfinished or damaged."""


class FingerprintError(ArtefactError):
    """Two artefacts that do not belong together, such as an index and another model's vectors."""


class MissingExtraError(SamethingError):
    """A command that needs an optional part of the installation."""

    def __init__(self, module: str, *, extra: str) -> None:
        super().__init__(
            f"the Python package {module!r} is not installed",
            expected=f"an installation with the {extra!r} extra",
            next_step=f"pip install 'samething[{extra}]'",
        )
        self.module = module
        self.extra = extra


def needed(module: str, *, extra: str) -> Any:
    """A package that an optional part of the installation brings, imported now.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(module.partition(".")[0], extra=extra) from error


def first_line(error: Exception) -> str:
    """The first line of a foreign error's message, cut to what a person reads.

    >>> first_line(ValueError("no such file\\nTraceback: …"))
    'no such file'
    """
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


_UNSHOWN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and newline, marks of direction, and what stands for bytes that are no UTF-8."""


def visible(text: str) -> str:
    """Text that cannot act on a terminal: control and direction characters and foreign bytes are escaped.

    >>> visible("caf\\udce9 \\x1b[2J"), visible("\\u202egpj.exe"), visible("été")
    ('caf\\\\xe9 \\\\x1b[2J', '\\\\u202egpj.exe', 'été')
    """

    def escaped(found: re.Match[str]) -> str:
        code = ord(found[0])
        code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _UNSHOWN.sub(escaped, text)


def is_utf8(text: str) -> bool:
    """Whether a path is text, rather than bytes of another encoding."""
    return not re.search("[\ud800-\udfff]", text)
