"""What vLLM loads in each of its processes (entry point group `vllm.general_plugins`)."""

from __future__ import annotations


def register() -> None:
    """Prepares vLLM for policies. Without policies it works as before."""
    from dspa.vllm_plugin.hooks import install

    install()
