"""A llama_cpp.server for the time of a with block."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def server(model: str, *options: str) -> Iterator[str]:
    """The address of a server of the model, which runs for as long as the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "llama_cpp.server", "--model", model, "--port", port]
    options = (*options, "--n_ctx", "512", "--n_threads", "1")
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen([*command, *options], stdout=log, stderr=log) as process,
    ):
        try:
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(log.read())
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
