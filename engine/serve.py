"""A local web page for a trained model: python -m engine.serve RUN_DIR.

Seeds, truncation, walks from one seed to another, and for autoencoders reconstructions of uploaded
images. In place of RUN_DIR an export's folder or file may stand. The page needs no network and
has no password: by default it answers this machine alone.
"""

import importlib.util
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from engine.checkpoint import CheckpointError
from engine.exported import is_export, open_export
from engine.run import RunError
from engine.studio import Studio, prune
from engine.trained import Choice, Model, open_run
from engine.verb import exit_code, say, warn

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

FIRST_PORT, PORTS = 7860, 100
LOOPBACK = ("127.0.0.1", "localhost")
MESSAGE_BYTES = 1 << 20  # of a request that uploads nothing
ENVELOPE_BYTES = 1 << 16  # what a form adds to a file


class ServeError(RuntimeError):
    """The page cannot be served, though the command is right."""


FAILURES = (ServeError, RunError, CheckpointError, OSError)


@dataclass(frozen=True)
class Command:
    """One page."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory, as `engine.train` names it at its end; or an export."""
    host: str = "127.0.0.1"
    """Address to answer at; 0.0.0.0 lets everyone in who reaches this machine."""
    port: int | None = None
    """Port; default: the first free one from 7860 on."""
    checkpoint: Choice = None
    """Images seen at the checkpoint to take, or best; default: the newest whole one."""
    ema: bool = True
    """Take the moving average of the weights where the run keeps one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    limit: int = 64
    """Most images that one request may ask for."""
    max_upload_mb: float = 10
    """Largest file that may be uploaded."""


class Limits:
    """Refuses requests that are too large, before they are read; keeps few uploads."""

    def __init__(self, app: "ASGIApp", upload_bytes: int, folder: Path) -> None:
        self.app, self.upload_bytes, self.folder = app, upload_bytes, folder

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """One request, as ASGI has it."""
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            upload = scope["path"].endswith("/upload")
            most = self.upload_bytes + ENVELOPE_BYTES if upload else MESSAGE_BYTES
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():  # the server holds a request to the length that it states
                return await _refuse(411, "the length of the request is missing", send)
            if int(length) > most:
                return await _refuse(413, f"larger than {most / 2**20:.1f} MB", send)
            if upload:
                prune(self.folder)
        return await self.app(scope, receive, send)


async def _refuse(status: int, text: str, send: Callable[[Any], Awaitable[None]]) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def check(command: Command) -> None:
    """Raise ValueError for values that cannot be served with, ServeError for a missing gradio."""
    if command.port is not None and not 0 < command.port < 65536:
        raise ValueError(f"--port {command.port} is no port: give one from 1 to 65535")
    if command.limit < 2:
        raise ValueError(f"--limit {command.limit} is too small: give at least 2")
    if not 0 < command.max_upload_mb <= 1024:
        raise ValueError(f"--max-upload-mb {command.max_upload_mb:g} must be above 0, at most 1024")
    if importlib.util.find_spec("gradio") is None:
        raise ServeError("the page needs gradio: pip install 'saddle[serve]'")


def open_model(command: Command) -> Model:
    """The run or the export. Raises ValueError, RunError or CheckpointError."""
    if not is_export(command.run_dir):
        return open_run(command.run_dir, command.checkpoint, command.ema, command.device, warn)
    if command.checkpoint is not None or not command.ema:
        flag = "--checkpoint" if command.checkpoint is not None else "--no-ema"
        raise ValueError(
            f"{flag} needs the run directory: an export holds one checkpoint's weights"
        )
    model = open_export(command.run_dir, command.device, warn)
    model.latent_dim()  # or it says what is to be used instead
    return model


def listen(host: str, port: int | None) -> socket.socket:
    """A socket at this port, or at the first free one. Raises ServeError naming the flag."""
    ports = [port] if port else range(FIRST_PORT, FIRST_PORT + PORTS)
    for number in ports:
        try:
            return socket.create_server(
                (host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET
            )
        except socket.gaierror as error:
            raise ServeError(f"--host {host} is no address ({error})") from error
        except OSError as error:
            reason = error.strerror or str(error)
    flags = f"--host {host} --port {port}" if port else f"--host {host}: ports from {ports[0]} on"
    raise ServeError(f"{flags} cannot be used ({reason.lower()}); another --port may be free")


def application(command: Command, model: Model, folder: Path) -> "ASGIApp":
    """The page as a web application; its files lie in `folder`."""
    os.environ |= {
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SSR_MODE": "False",
        "HF_HUB_OFFLINE": "1",
    }
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from engine.playground import CSS, THEME, build

    made = folder / "made"
    made.mkdir()
    upload_bytes = int(command.max_upload_mb * 2**20)
    page = build(Studio(model, made, command.limit, upload_bytes), folder)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Limits, upload_bytes=upload_bytes, folder=folder)
    if command.host in LOOPBACK:  # another site's name that leads here is not let in
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=command.host,
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size=upload_bytes,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        theme=THEME,
        css=CSS,
    )


def serve(command: Command) -> None:
    """Open the model and show the page until Ctrl-C or SIGTERM. Raises ValueError for a wrong
    command, ServeError, RunError, CheckpointError or OSError for the rest."""
    check(command)
    model = open_model(command)
    with (
        listen(command.host, command.port) as listener,
        tempfile.TemporaryDirectory(prefix="saddle-serve-", ignore_cleanup_errors=True) as folder,
    ):
        app = application(command, model, Path(folder))
        import uvicorn

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                port = listener.getsockname()[1]
                place = "127.0.0.1" if command.host in ("0.0.0.0", "::") else command.host
                place = f"[{place}]" if ":" in place else place
                say(
                    f"{model.name} at {model.images:,} images: http://{place}:{port}  (Ctrl-C ends)"
                )
                if command.host not in (*LOOPBACK, "::1"):
                    warn("there is no password: everyone who reaches this machine can use the page")

        # open pages hold a stream each, which would hold the end
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        Server(settings).run(sockets=[listener])


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code: 2 for a wrong command, 1 for one that fails."""
    command = tyro.cli(Command, prog="python -m engine.serve", description=__doc__, args=arguments)
    signal.signal(signal.SIGTERM, _end)
    try:
        return exit_code(lambda: serve(command), FAILURES)
    except KeyboardInterrupt:
        say("ended")
        return 0


if __name__ == "__main__":
    sys.exit(main())
