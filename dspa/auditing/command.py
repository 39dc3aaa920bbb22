"""`dspa audit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspa.auditing.audit import audit
from dspa.auditing.forward import Decoding
from dspa.auditing.prompts import PromptSource, read_prompts
from dspa.auditing.report import PolicyAudit
from dspa.errors import InvalidInputError
from dspa.methods.saved_policy import load_policy
from dspa.offline.preferences import load_preferences
from dspa.transformers_model import load_language_model
from dspa.util.files import write_atomically


@dataclass(frozen=True)
class AuditRequest:
    """The options of the command; see its help."""

    policy: str
    model: str | None
    prompts: Path | None
    labels: Path | None
    densities: Path | None
    preferences: str | None
    preference_limit: int | None
    limit: int | None
    chat: bool
    decoding: Decoding
    dtype: str
    device: str


def run_audit(request: AuditRequest, *, html: Path | None, markdown: Path | None, progress: bool = True) -> PolicyAudit:
    """Audits a saved policy and writes the reports that were requested.

    Raises:
        DspaError: for what cannot be read, does not belong together, or cannot be written.
    """
    if request.prompts is not None and request.model is None:
        raise InvalidInputError("--prompts needs a model to steer; pass --model")
    if request.preferences is not None and (request.densities is None or request.model is None):
        raise InvalidInputError("--preferences shows the texts of triples; pass --densities and --model as well")
    policy = load_policy(request.policy)
    prompts: Sequence[PromptSource] | None = None
    if request.prompts is not None:
        prompts = read_prompts(request.prompts, request.limit)
    model: Any = None
    tokenizer: Any = None
    if request.model is not None:
        model, tokenizer = load_language_model(request.model, request.dtype, request.device)
    triples = None
    if request.preferences is not None:
        triples = load_preferences(request.preferences, tokenizer, limit=request.preference_limit)
    found = audit(
        policy,
        model,
        tokenizer,
        prompts=prompts,
        labels=request.labels,
        densities=request.densities,
        triples=triples,
        decoding=request.decoding,
        chat=request.chat,
        progress=progress,
    )
    if html is not None:
        write_atomically(html, found.to_html().encode())
    if markdown is not None:
        write_atomically(markdown, found.to_markdown().encode())
    return found
