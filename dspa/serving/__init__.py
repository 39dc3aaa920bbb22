"""Serving a steered model over HTTP."""
