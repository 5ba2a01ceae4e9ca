"""`fluxonnx serve`: a server with a queue, a page, and the APIs of OpenAI and AUTOMATIC1111."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fluxonnx.cli.flags import add_parser, add_quiet, find_model, not_empty, path_name, thread_count
from fluxonnx.cli.messages import complain
from fluxonnx.cli.progress import speaker
from fluxonnx.errors import UsageError

# Keys in a variable are not seen in the list of processes.
KEY_VARIABLE = "FLUXONNX_API_KEY"
SHORTEST_KEY = 8


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        "serve",
        run,
        "serve a page, a queue of jobs, and the APIs of OpenAI and AUTOMATIC1111",
        "[-d DIR ...] [--port N] [--host ADDRESS --api-key KEY] [options]",
        "fluxonnx serve -d model",
        "fluxonnx serve -d model -d other-model --port 8000 --data /srv/fluxonnx",
        f"{KEY_VARIABLE}=... fluxonnx serve -d model --host 0.0.0.0 --allowed-host pictures.example",
    )
    parser.add_argument(
        "-d",
        "--dir",
        type=not_empty,
        action="append",
        metavar="DIR",
        help="model directory, or a repository of the hub; can be repeated (default: as for generate)",
    )
    place = parser.add_argument_group("where")
    place.add_argument(
        "--host", type=not_empty, default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    place.add_argument(
        "--port", type=_port, default=7860, metavar="N", help="default: %(default)s; 0 for any that is free"
    )
    place.add_argument(
        "--data",
        type=path_name,
        metavar="DIR",
        help="folder of the queue and the pictures (default: fluxonnx in $XDG_DATA_HOME or ~/.local/share)",
    )
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key",
        type=not_empty,
        action="append",
        default=[],
        metavar="KEY",
        help=f"ask for this key; can be repeated, one for each person; better in ${KEY_VARIABLE}, with commas between",
    )
    access.add_argument(
        "--insecure", action="store_true", help="serve other machines without a key, to everybody who reaches this one"
    )
    access.add_argument(
        "--allowed-host",
        type=not_empty,
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which the server may be called, besides addresses and localhost; can be repeated",
    )
    access.add_argument(
        "--cors-origin",
        type=_origin,
        action="append",
        default=[],
        metavar="URL",
        help="an origin whose web pages may use the server, such as https://pictures.example; can be repeated",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--precision", metavar="NAME", help="as for generate")
    model.add_argument("--provider", metavar="NAME", help="as for generate")
    model.add_argument(
        "--threads", type=thread_count, metavar="N", help="default: one per core that this process may use"
    )
    model.add_argument("--low-memory", action="store_true", help="use less memory and more time")
    model.add_argument(
        "--lora-dir", type=path_name, metavar="DIR", help="folder whose .safetensors files may be used as LoRA"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-pixels", type=int, metavar="N", help="of a picture (default: 4194304)")
    limits.add_argument("--max-count", type=int, metavar="N", help="pictures of a job (default: 100)")
    limits.add_argument("--max-queue", type=int, metavar="N", help="waiting jobs of a key (default: 1000)")
    limits.add_argument("--max-body", type=int, metavar="MB", help="of a request, in megabytes (default: 64)")
    limits.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="end a request whose head takes longer than this, or whose body stops for as long (default: 20 and 30)",
    )
    limits.add_argument(
        "--drain",
        type=float,
        default=30,
        metavar="SECONDS",
        help="how long the running job may take to finish when the server is asked to end; then it goes back into the "
        "queue (default: %(default)s)",
    )
    parser.add_argument(
        "--log", choices=("text", "json"), help="format of the log (default: text on a terminal, else json)"
    )
    add_quiet(parser)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 65536:
        raise argparse.ArgumentTypeError(f"{text[:40]} is no port: choose one from 0 to 65535")
    return port


def _origin(text: str) -> str:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path not in ("", "/") or parts.query:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no origin: write it as https://NAME or https://NAME:PORT")
    return f"{parts.scheme}://{parts.netloc}"


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import sse_starlette  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f'the server needs {error.name}: pip install "fluxonnx[serve]"') from None
    from fluxonnx.serve import logs
    from fluxonnx.serve.server import is_loopback, run
    from fluxonnx.serve.settings import MEGABYTE, Limits, Settings, default_data

    keys = [*arguments.api_key, *filter(None, os.environ.get(KEY_VARIABLE, "").split(","))]
    for key in keys:
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(f"an API key has to have at least {SHORTEST_KEY} ASCII characters, and no space")
    if not keys and not is_loopback(arguments.host) and not arguments.insecure:
        raise UsageError(
            f"other machines reach {arguments.host}: set a key with --api-key, or serve everybody with --insecure"
        )
    asked = {
        "pixels": arguments.max_pixels,
        "count": arguments.max_count,
        "queue": arguments.max_queue,
        "body": None if arguments.max_body is None else arguments.max_body * MEGABYTE,
        "header_seconds": arguments.timeout,
        "body_seconds": arguments.timeout,
    }
    limits = Limits(**{name: value for name, value in asked.items() if value is not None})
    if not 0 <= arguments.drain <= 24 * 60 * 60:
        raise UsageError(f"--drain is {arguments.drain:g}, but must be from 0 to {24 * 60 * 60} seconds")
    if arguments.lora_dir is not None and not arguments.lora_dir.is_dir():
        raise UsageError(f"{arguments.lora_dir} is no folder: choose another with --lora-dir")
    say = speaker(arguments.quiet)
    settings = Settings(
        models=tuple(Path(find_model(name, say)) for name in arguments.dir or [None]),
        data=arguments.data or default_data(),
        host=arguments.host,
        port=arguments.port,
        keys=tuple(dict.fromkeys(keys)),
        precision=arguments.precision,
        provider=arguments.provider,
        threads=arguments.threads,
        low_memory=arguments.low_memory,
        lora_dir=arguments.lora_dir,
        hosts=tuple(arguments.allowed_host),
        origins=tuple(arguments.cors_origin),
        limits=limits,
        drain=arguments.drain,
    )
    logs.start(arguments.log, arguments.quiet)
    run(settings, say, warn=lambda message: None if arguments.quiet else complain(f"warning: {message}"))
