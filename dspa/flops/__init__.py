"""Counting FLOPs: by formula, by running the model's code under a counter, and as a report."""
