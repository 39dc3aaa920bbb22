"""`dspa serve`: a model under policies behind an OpenAI-compatible server.

`MODEL` is the model as it is, `MODEL@POLICY` the model under a policy. All of them are one model in memory; requests
take turns.
"""

from __future__ import annotations

import socket
from pathlib import Path

from dspa.errors import InvalidInputError
from dspa.methods.policy import Policy
from dspa.methods.saved_policy import load_policy
from dspa.transformers_model import load_language_model


def named_policies(sources: list[str]) -> dict[str, Policy]:
    """Policies from `NAME=FOLDER`, or from `FOLDER` alone, which then is the name.

    Raises:
        InvalidInputError: if there is none, two have one name, or one cannot be loaded.
    """
    policies: dict[str, Policy] = {}
    for source in sources:
        name, separator, folder = source.partition("=")
        if not separator or Path(source).is_dir():
            name, folder = Path(source).name, source
        if not name or name in policies:
            raise InvalidInputError(f"policy {source!r} has the name {name!r}, as another one has; pass NAME=FOLDER")
        policies[name] = load_policy(folder)
    if not policies:
        raise InvalidInputError("no policy was given; pass --policy FOLDER or --policy NAME=FOLDER")
    return policies


def run_server(
    model: str,
    policies: list[str],
    *,
    host: str,
    port: int,
    dtype: str,
    device: str,
    context_tokens: int | None = None,
    default_tokens: int = 1024,
) -> None:
    """Loads everything and serves until interrupted. The port is taken first. The last two are those of `ServerLimits`.

    Raises:
        InvalidInputError: if the port is taken, or the model or a policy cannot be loaded.
        MismatchError: if a policy belongs to another model.
    """
    try:
        import uvicorn

        from dspa.serving.app import build_app
        from dspa.serving.engine import Engine, ServerLimits
    except ImportError as error:
        raise InvalidInputError(
            f"the server needs packages that are not installed ({error}); install them with: pip install 'dspa[serve]'"
        ) from error

    with listening_socket(host, port) as listener:
        loaded = named_policies(policies)
        language_model, tokenizer = load_language_model(model, dtype, device)
        limits = ServerLimits(context_tokens=context_tokens or 0, default_tokens=default_tokens)
        engine = Engine(model, language_model, tokenizer, loaded, limits)
        try:
            address = f"http://{host}:{listener.getsockname()[1]}/v1"
            print(f"serving {', '.join(engine.names)} on {address}", flush=True)
            uvicorn.Server(uvicorn.Config(build_app(engine), log_level="warning")).run(sockets=[listener])
        finally:
            engine.close()


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        InvalidInputError: if the address does not exist or is taken.
    """
    if not 0 <= port < 65536:
        raise InvalidInputError(f"cannot listen on port {port}; expected 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InvalidInputError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; pass another --port or --host"
        ) from error
    return listener
