"""Shapes and dtypes in signatures are checked in every test run."""

import hypothesis
from jaxtyping import install_import_hook

install_import_hook("samething", "beartype.beartype")

# how long an example takes says nothing on a machine that does other things too
hypothesis.settings.register_profile("samething", deadline=None)
hypothesis.settings.load_profile("samething")
