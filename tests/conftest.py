"""Shapes and dtypes in signatures are checked in every test run."""

from jaxtyping import install_import_hook

install_import_hook("samething", "beartype.beartype")
