"""Serve this folder to browsers on this machine: python serve.py [--port 8000] [--model FOLDER].

Unlike `python -m http.server`, it sends the headers that let WebAssembly use several threads, and it can show a folder
of graphs that lies elsewhere as `model/`.
"""

import argparse
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Handler(SimpleHTTPRequestHandler):
    """Files of the page, and those of the model."""

    model: Path
    # What a Windows registry may say otherwise; browsers insist on these.
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".css": "text/css",
    }

    def translate_path(self, path: str) -> str:
        """Return the file that a path of the page stands for."""
        below = Path(super().translate_path(path)).relative_to(HERE)
        return str(self.model / Path(*below.parts[1:]) if below.parts[:1] == ("model",) else HERE / below)

    def end_headers(self) -> None:
        """Isolate the page, which is what shared memory asks for."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing about requests."""


def main() -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve the page and a model to browsers on this machine.")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one (default: 8000)")
    parser.add_argument("--model", type=Path, default=HERE / "model", help="a folder of graphs (default: model/)")
    arguments = parser.parse_args()
    Handler.model = arguments.model.resolve()
    if not (Handler.model / "fluxonnx.json").is_file():
        command = f"fluxonnx export --flavour portable --precision fp32 -o {arguments.model}"
        print(f"serve.py: {arguments.model} holds no graphs: {command}", file=sys.stderr)
        return 1
    if not (HERE / "node_modules/onnxruntime-web").is_dir():
        print(f"serve.py: the libraries are missing: npm install --prefix {HERE}", file=sys.stderr)
        return 1
    try:
        server = ThreadingHTTPServer(("127.0.0.1", arguments.port), lambda *a: Handler(*a, directory=str(HERE)))
    except (OSError, OverflowError) as error:
        print(f"serve.py: can't use port {arguments.port} ({error}): choose another --port", file=sys.stderr)
        return 1
    print(f"http://localhost:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
