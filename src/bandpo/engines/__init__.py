"""Adapters that hand a trainer per-token bounds where it already clamps; one file each, none imported by the core."""
