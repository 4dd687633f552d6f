"""The serve stage: runs -> a local page on which a person clicks on images and sees what teacher and students make."""

import errno
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from fmdistill.logs import log
from fmdistill.recipe import parse_overrides
from fmdistill.registry import UserError, typed
from fmdistill.settings import is_override

PORT = 8000  # the first port to try
TRIES = 50  # ports after it, if they are in use
PACKAGES = ("starlette", "uvicorn")  # the extra `serve`


@dataclass(frozen=True)
class ServeSettings:
    """Settings of `fmdistill serve`: the address, the device of the networks, and whether runs may name code."""

    host: str = "127.0.0.1"
    port: int | None = None  # null = PORT, or the next one that is free
    device: str = "auto"
    trust: bool = False

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port}: expected 0 (any free port) to 65535")


def run(arguments: Sequence[str]) -> None:
    """Serve a page about the run folders among `arguments` until it is stopped; the others are settings, key=value.

    Raises UserError if the extra `serve` is not installed, a run cannot be shown, or the address is in use.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"serve: {' and '.join(missing)} not installed; pip install 'fmdistill[serve]'")
    folders = [argument for argument in arguments if not is_override(argument)]
    overrides = parse_overrides(argument for argument in arguments if is_override(argument))
    settings = ServeSettings(**typed(ServeSettings, overrides, "serve"))
    if not folders:
        raise UserError("serve: no run is named; give one or more run folders, such as runs/demo/sam_mse")
    with bind_address(settings.host, settings.port) as listening:  # before the networks are loaded
        _serve(folders, settings, listening)


def _serve(folders: Sequence[str], settings: ServeSettings, listening: socket.socket) -> None:
    import uvicorn

    from fmdistill.serve import app, subjects

    opened = subjects.open_runs(folders, settings.device, settings.trust)
    host, port = listening.getsockname()[:2]
    server = uvicorn.Server(uvicorn.Config(app.build(opened, settings.host), log_level="warning"))
    if not is_loopback(settings.host):
        log.warning("host=%s: everyone who can reach this machine can open the page and load images", settings.host)
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)", flush=True)
    server.run(sockets=[listening])


def bind_address(host: str, port: int | None) -> socket.socket:
    """Return a socket that is bound to `port`, or if it is None to PORT or the next port that is free.

    Raises UserError if the port is in use, or the host is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"host={host}: not an address of this machine ({error}); use 127.0.0.1 or 0.0.0.0") from None
    for candidate in range(PORT, PORT + TRIES) if port is None else (port,):
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server that was just stopped leaves it
        try:
            bound.bind((address[0], candidate, *address[2:]))
            bound.listen()
            return bound
        except OSError as error:
            bound.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(f"host={host}: {error.strerror}; use 127.0.0.1 or 0.0.0.0") from None
    if port is None:
        raise UserError(f"port: {PORT} to {PORT + TRIES - 1} are all in use; name a free one with port=NUMBER")
    raise UserError(f"port={port}: in use, or not allowed; choose another, or leave it out for the next free one")


def is_loopback(host: str) -> bool:
    """Return whether `host` is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
