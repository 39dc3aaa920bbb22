"""Choosing a policy's settings on held-out preferences, and looking at policies side by side."""
