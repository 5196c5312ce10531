"""Public data sets and the user's own: one small file each, from the official layout to a catalog."""
