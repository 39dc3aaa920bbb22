"""What tests of programs on the organism share."""

from __future__ import annotations

import pytest


@pytest.fixture
def short_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses are cut after a sentence or two, where a test does not depend on what they say."""
    monkeypatch.setattr("dspa.organism.evaluation.MAX_RESPONSE_TOKENS", 16)
