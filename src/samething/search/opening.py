"""Opening an image in the program that this computer shows images with."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import webbrowser

from samething.errors import InputError
from samething.images import is_url


def open_image(location: str) -> None:
    """Open a file, or an address in the browser; returns at once.

    Raises:
        InputError: it cannot be opened here.
    """
    try:
        if is_url(location):
            if not location.startswith("http") or not webbrowser.open(location):
                raise OSError("no browser for this kind of address")
        elif sys.platform == "win32":
            os.startfile(location)
        else:
            program = "open" if sys.platform == "darwin" else "xdg-open"
            process = subprocess.Popen(
                [program, location], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            threading.Thread(target=process.wait, daemon=True).start()  # some viewers stay in front
    except OSError as error:
        raise InputError(
            f"{location} cannot be opened here ({error})",
            expected="a desktop with xdg-open, open or a browser",
            next_step="leave --open out: the path is printed whole",
        ) from error
