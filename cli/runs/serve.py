"""What `layerpack serve` does once its options are known; imported late, as it needs torch."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import uvicorn

from layerpack.cli.options.memory import limits_of
from layerpack.cli.sign_of_life import SignOfLife
from layerpack.formats.errors import TargetError
from layerpack.formats.pack import Pack
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import DEFAULT_CONTEXT_TOKENS, OpenOptions
from layerpack.runtime.sequences import context_and_kv
from layerpack.serving.app import Settings, create_app


class _Server(uvicorn.Server):
    """Says when it listens, and when it is told to end."""

    def __init__(self, config: uvicorn.Config, model: Model, url: str, name: str) -> None:
        super().__init__(config)
        self._model, self._url, self._name = model, url, name

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        click.echo(f"serving {self._name} at {self._url}/v1", err=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        running, waiting = self._model.counts.running, self._model.num_waiting
        if running or waiting:
            grace_s = self.config.timeout_graceful_shutdown
            click.echo(
                f"ending: {running} answers under way and {waiting} in the queue have {grace_s} s",
                err=True,
            )
        await super().shutdown(sockets)


def run(
    path: Path, options: dict[str, Any], life: SignOfLife, *, on_open: Callable[[], object]
) -> int:
    """Serve until told to end; the exit code. Raises LayerpackError."""
    pack = Pack.open(path)
    listening = _listen(options["host"], options["port"])
    with listening:
        context, kv_tokens = context_and_kv(
            pack,
            context=options["context"] or DEFAULT_CONTEXT_TOKENS,
            sequences=options["sequences"],
            device=options["device"],
            limits=limits_of(options),
        )
        how = OpenOptions(
            device=options["device"],
            limits=limits_of(options),
            context_tokens=context,
            kv_tokens=kv_tokens,
            draft=options["draft"],
            same_bits=True,
        )
        with Model.open(pack, how) as model:
            on_open()
            life.over()
            name = options["name"] or path.resolve().name
            settings = Settings(
                names=(name, pack.manifest.source.id),
                api_key=options["api_key"],
                cors_origins=options["cors_origins"],
                max_body_bytes=options["max_body_bytes"],
                max_waiting=options["max_waiting"],
                default_tokens=options["max_new_tokens"],
            )
            config = uvicorn.Config(
                create_app(model, settings),
                log_level="warning",
                timeout_graceful_shutdown=options["grace_s"],
            )
            host, port = listening.getsockname()[:2]
            if not ipaddress.ip_address(host).is_loopback and options["api_key"] is None:
                click.echo(
                    "note: whoever reaches this port may ask; --api-key keeps others out", err=True
                )
            shown = f"[{host}]" if ":" in host else host
            server = _Server(config, model, f"http://{shown}:{port}", name)
            server.run(sockets=[listening])
            click.echo(
                f"[{model.counts.generated_tokens} tokens in {model.counts.passes} passes]",
                err=True,
            )
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Now, as opening takes a while: a port that is taken is said at once. Raises TargetError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise TargetError(
            f"{host}:{port}: {error.strerror or error}; give another --port or --host"
        ) from error
    return listening
