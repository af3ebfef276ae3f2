"""`serve`: a page and a JSON endpoint on this machine."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import socket
from pathlib import Path

from recsys_examples.command import make_console, whole_number
from recsys_examples.errors import InputError
from recsys_examples.movielens.command import add_model
from recsys_examples.runs import find_saved_model

PACKAGES = ("fastapi", "jinja2", "uvicorn")  # the extra `serve`


def add_serve(commands: argparse._SubParsersAction, out: str) -> None:
    """Add the command that serves a run."""
    parser = commands.add_parser(
        "serve", help="show recommendations and the experts behind them on a page"
    )
    parser.set_defaults(run=serve)
    add_model(parser, out)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=whole_number(0, 65_535),
        default=8000,
        help="port to listen on, 0 for a free one (default: %(default)s)",
    )


def serve(options: argparse.Namespace) -> None:
    """Serve the SavedModel of a run until it is interrupted.

    Raises:
        InputError: if a package is not installed, there is no SavedModel that can
            explain, or the address cannot be listened on.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise InputError(f'serve needs {package}: run `pip install ".[serve]"`')
    find_saved_model(options.model)
    # `uvicorn` raises it again after it has stopped, unless interrupts are ignored, as
    # in the background of a shell.
    with (
        contextlib.suppress(KeyboardInterrupt),
        _listening(options.host, options.port) as listener,
    ):
        _run(options.model, listener)
    make_console().print("Stopped.")


def _run(run: Path, listener: socket.socket) -> None:
    import uvicorn

    from recsys_examples.movielens.recommendations import ExplainedModel
    from recsys_examples.movielens.web.app import make_app

    model = ExplainedModel(run)
    model.for_newcomer([], 1)  # The first call is slow.
    server = uvicorn.Server(uvicorn.Config(make_app(model), log_level="warning"))
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    make_console().print(f"Serving http://{shown}:{port} (Ctrl+C stops it)")
    server.run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, so that a port in use is an error at once."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise InputError(f"--host {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # Whoever reads the address may connect at once.
    except OSError as error:
        listener.close()
        raise InputError(f"--host {host} --port {port}: {error.strerror}") from error
    return listener
