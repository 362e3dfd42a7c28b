"""One process that serves: binds first, loads, answers, and on SIGTERM lets what is under way come to its end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from fourscore.files import FourscoreError
from fourscore.serve.keys import KeyRing
from fourscore.serve.source import Source

if TYPE_CHECKING:
    import uvicorn

    from fourscore.guards import Guard
    from fourscore.serve.service import Service
    from fourscore.serve.settings import Settings


def serve(
    source: Source,
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Path | None = None,
    *,
    insecure: bool = False,
    guards: Sequence[Guard] = (),
    as_json: bool = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Errors at once: a port in use; no keys on an address that others can reach."""
    try:
        import uvicorn

        from fourscore.serve.app import create_app
        from fourscore.serve.service import Service
    except ImportError as error:
        raise FourscoreError(f"serving needs {error.name}", todo="pip install 'fourscore[serve]'") from error
    if keys is None and not insecure and not _loopback(host):
        raise FourscoreError(
            "anybody who reaches this address could use the model", where=host, todo="name a key file with --keys, or say --insecure"
        )
    ring = KeyRing(keys) if keys else None
    with contextlib.closing(_bound(host, port)) as listener:
        service = Service(source.engine(), source, settings, ring, guards)
        service.warm_up()
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=round(settings.drain),
        )
        _announce(service, f"http://{_shown(host)}:{listener.getsockname()[1]}", as_json)
        try:
            asyncio.run(_draining(uvicorn.Server(config), service, listener))
        finally:
            service.engine.close(drain=False)


async def _draining(server: uvicorn.Server, service: Service, listener: socket.socket) -> None:
    """Run the server; a first signal lets answers under way end and refuses new ones, a second one ends at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        service.draining = True
        server.handle_exit(number, frame)

    @contextlib.contextmanager
    def signals() -> Iterator[None]:  # uvicorn's own would raise the signal once more at the end, and the exit code would be its
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    server.capture_signals = signals  # type: ignore[method-assign]
    await server.serve(sockets=[listener])


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        what = getattr(error, "strerror", None) or str(error)
        raise FourscoreError(f"cannot listen there ({what})", where=f"{host}:{port}", todo="choose another --port or --host") from None
    return listener


def _announce(service: Service, url: str, as_json: bool) -> None:
    source = service.source
    if as_json:
        print(json.dumps({"event": "ready", "url": url, "models": list(service.models), "faults": list(source.faults)}), flush=True)
        return
    for fault in source.faults:
        print(f"UNVERIFIED: {fault}", file=sys.stderr)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"serving {', '.join(service.models)} at {url} (Ctrl-C stops)", file=sys.stderr, flush=True)
