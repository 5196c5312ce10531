"""The catalog: one table that says which images there are, what each one shows and what it is used for."""

from __future__ import annotations

from samething.catalog.catalog import Catalog, Dropped, Problem, require_shares
from samething.catalog.tables import (
    BOX_COLUMNS,
    FORMAT_VERSION,
    ROLES,
    SCHEMA,
    Role,
    is_own_format,
    read_table,
)

__all__ = [
    "BOX_COLUMNS",
    "FORMAT_VERSION",
    "ROLES",
    "SCHEMA",
    "Catalog",
    "Dropped",
    "Problem",
    "Role",
    "is_own_format",
    "read_table",
    "require_shares",
]
