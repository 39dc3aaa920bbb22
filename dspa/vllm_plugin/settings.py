"""Which policies a vLLM engine serves: named once, when it starts, and known to all of its processes.

They are named by the environment variable `DSPA_VLLM_POLICIES="kind=FOLDER,brief=FOLDER"`, or in vLLM's
`additional_config={"dspa": {"kind": FOLDER, "brief": FOLDER}}`. The process that starts the engine reads them, and
puts what the others have to know in that place of the configuration, as plain JSON.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dspa.errors import CorruptFileError, InvalidInputError
from dspa.methods.hub import local_folder
from dspa.methods.policy import EditPositions, Policy
from dspa.methods.saved_policy import KINDS, load_policy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.sae.autoencoder import SparseAutoencoder

ENVIRONMENT_VARIABLE = "DSPA_VLLM_POLICIES"
CONFIG_KEY = "dspa"  # in vLLM's additional_config
REQUEST_KEY = "dspa"  # in a request's extra_args
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class ServedPolicy:
    """What every process knows of a policy.

    Attributes:
        folder: where it is.
        fingerprint: SHA-256 of its files.
        edit_positions: which positions it edits.
        layer: the decoder layer after which it edits.
        reading_layer: the decoder layer after which it reads prompts; None for a policy that reads nothing.
        reading: what it reads prompts by, the same for policies that read alike; None for one that reads nothing.
    """

    folder: str
    fingerprint: str
    edit_positions: EditPositions
    layer: int
    reading_layer: int | None
    reading: str | None


@dataclass(frozen=True)
class EngineSettings:
    """The policies of one engine, by name."""

    policies: Mapping[str, ServedPolicy]

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers after which prompts are read or tokens edited, ascending."""
        found = {policy.layer for policy in self.policies.values()}
        found |= {policy.reading_layer for policy in self.policies.values() if policy.reading_layer is not None}
        return tuple(sorted(found))

    @property
    def token(self) -> str:
        """By which processes know that they serve the same policies: a digest of what is known of them, but for the
        folders, which are others on other nodes."""
        known = {name: {**asdict(policy), "folder": None} for name, policy in self.policies.items()}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"served": {name: asdict(policy) for name, policy in self.policies.items()}}

    @classmethod
    def from_json(cls, recorded: Any) -> EngineSettings | None:
        """The settings that `as_json` wrote; None if the engine has no policies.

        Raises:
            InvalidInputError: for policies that the process which starts the engine has not read.
        """
        if not recorded:
            return None
        if not isinstance(recorded, dict) or recorded.keys() != {"served"}:
            raise InvalidInputError(
                "policies were named in a vLLM configuration that was not made by EngineArgs; start vLLM by LLM(...), "
                "AsyncEngineArgs or `vllm serve`"
            )
        return cls({name: ServedPolicy(**fields) for name, fields in recorded["served"].items()})

    def load(self, device: torch.device) -> dict[str, Policy]:
        """The policies themselves. Those that read alike share the SAE they read by, in memory.

        Args:
            device: where prompts are read, and looked up.

        Raises:
            InvalidInputError: if a folder is gone.
            CorruptFileError: if a file is truncated or altered, or is another one than when the engine started.
        """
        read_by: dict[str | None, Any] = {}
        found: dict[str, Policy] = {}
        for name, served in self.policies.items():
            policy: Any = load_policy(served.folder)
            if _digest(Path(served.folder)) != served.fingerprint:
                raise CorruptFileError(
                    f"policy {name!r} in {served.folder} is not the one that vLLM was started with; start it again"
                )
            if isinstance(policy, SteeringPolicy):  # checked as it was read: parts are exchanged for equal ones
                policy, fitted = copy.copy(policy), policy.conditional_map
                features = None if fitted.features is None else fitted.features.to(device)
                parts = {
                    "input_sae": read_by.setdefault(served.reading, policy.input_sae),
                    "conditional_map": replace(fitted, matrix=fitted.matrix.to(device), features=features),
                }
                for part, value in parts.items():
                    object.__setattr__(policy, part, value)
            found[name] = policy
        return found


def named_sources(environment: str | None, configured: Any) -> dict[str, str]:
    """Folders by name, from the environment variable and from vLLM's configuration; none if no policy is named.

    Raises:
        InvalidInputError: if a name is not usable in a model's name, or names two policies.
    """
    named: list[tuple[str, str]] = []
    for entry in filter(None, (part.strip() for part in (environment or "").split(","))):
        name, separator, folder = entry.partition("=")
        if not separator:
            raise InvalidInputError(f"{ENVIRONMENT_VARIABLE} has the entry {entry!r}; expected NAME=FOLDER,...")
        named.append((name, folder))
    if configured is not None:
        if not isinstance(configured, Mapping) or not all(isinstance(folder, str) for folder in configured.values()):
            raise InvalidInputError(f"additional_config[{CONFIG_KEY!r}] is {configured!r:.80}; expected NAME: FOLDER")
        named += configured.items()
    found: dict[str, str] = {}
    for name, folder in named:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InvalidInputError(f"a policy has the name {name!r}; expected letters, digits, dots, - and _")
        if found.get(name, folder) != folder:
            raise InvalidInputError(f"two policies have the name {name!r}; give each its own")
        found[name] = folder
    return found


def read_policies(sources: Mapping[str, str]) -> EngineSettings:
    """Loads every policy and keeps what other processes have to know of it.

    Raises:
        InvalidInputError: if there is no such policy, or it cannot be served by vLLM.
        CorruptFileError: if a file is truncated or altered.
    """
    served = {}
    for name, source in sources.items():
        folder = local_folder(source, [pattern for kind in KINDS for pattern in kind.patterns])
        policy: Policy = load_policy(folder)
        observation = policy.observation
        if observation is not None and policy.edit_positions == "all":
            raise InvalidInputError(
                f"policy {name!r} edits all positions by what it reads of the whole prompt; vLLM computes a prompt in "
                "pieces and reuses pieces of other prompts, so use edit_positions='from_last_prompt'"
            )
        reading = None
        if observation is not None:
            sae = SparseAutoencoder.from_any(observation.sae, "input").encoder_only()
            parts = (str(observation.layer), sae.fingerprint(), *map(str, sorted(set(policy.uncounted_token_ids))))
            reading = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        served[name] = ServedPolicy(
            folder=str(Path(folder).resolve()),
            fingerprint=_digest(Path(folder)),
            edit_positions=policy.edit_positions,
            layer=policy.intervention.layer,
            reading_layer=None if observation is None else observation.layer,
            reading=reading,
        )
    return EngineSettings(served)


def requested_policy(extra_args: Mapping[str, Any] | None, known: Mapping[str, Any]) -> str | None:
    """The policy that a request names; None for a request that is not to be steered.

    Raises:
        InvalidInputError: for a name that the engine was not started with.
    """
    name = (extra_args or {}).get(REQUEST_KEY)
    if name is None:
        return None
    if not isinstance(name, str) or name not in known:
        raise InvalidInputError(f"policy {name!r:.80} is not served here; expected one of {', '.join(known)}")
    return name


def check_request(
    settings: EngineSettings | None,
    extra_args: Mapping[str, Any] | None,
    *,
    has_tokens: bool,
    has_embeddings: bool,
    grows: bool,
) -> str | None:
    """The policy of a request; None for one that is not to be steered.

    Args:
        settings: of the engine; None if it has no policies.
        extra_args: the request's.
        has_tokens: whether its prompt is known as tokens.
        has_embeddings: whether it comes as embeddings, whole or in part.
        grows: whether more of the prompt may come later.

    Raises:
        InvalidInputError: for a request that names a policy and would not be steered right.
    """
    if (extra_args or {}).get(REQUEST_KEY) is None:
        return None
    if settings is None:
        raise InvalidInputError("a request names a policy; this engine was started without any")
    name = requested_policy(extra_args, settings.policies)
    if has_embeddings or not has_tokens:
        raise InvalidInputError("a request with a policy has its prompt as embeddings; pass text or tokens")
    if grows:
        raise InvalidInputError("a request with a policy has a prompt that grows; pass it whole")
    return name


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for kind in KINDS for pattern in kind.patterns for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
