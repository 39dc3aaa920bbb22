"""Steering inside vLLM: requests of one continuous batch, each under its own policy or none."""
