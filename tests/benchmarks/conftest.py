"""What tests of programs on the organism share."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """A Llama with random weights, and a tokenizer for it."""
    return tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()


@pytest.fixture
def short_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses are cut after a sentence or two, where a test does not depend on what they say."""
    monkeypatch.setattr("dspa.organism.evaluation.MAX_RESPONSE_TOKENS", 16)
