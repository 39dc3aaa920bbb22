"""Atomic files, progress bars, parts of reports."""
