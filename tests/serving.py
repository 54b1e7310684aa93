"""A server in this process, for the official clients."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from mobilellm_cpp.server.app import create_app


class Running:
    """A server that listens: its app, service and address."""

    def __init__(self, app, port):
        self.app, self.port = app, port
        self.service = app.state.service
        self.url = f"http://127.0.0.1:{port}"

    def idle(self, seconds=10.0):
        """Waits until no work is left."""
        end = time.monotonic() + seconds
        while self.service.scheduler.count() != (0, 0) and time.monotonic() < end:
            time.sleep(0.005)
        return self.service.scheduler.count() == (0, 0)


@contextmanager
def running(llm, name="demo", **options):
    app = create_app(llm, name, **options)
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, lifespan="on", log_level="warning", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield Running(app, bound.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
