"""What a server costs: streaming clients of `mobilellm serve` against the bare loop of llama.h with
as many sequences in a batch, and against `python -m llama_cpp.server` over stock llama.cpp.

    .venv/bin/pip install 'llama-cpp-python[server]==0.3.36'      # for the latter, with CMAKE_ARGS
    .venv/bin/python benchmarks/server.py --rounds 5              # Markdown to stdout

A round runs all sides one after the other, each in a process of its own; ratios are taken within a
round, and the table has their medians. The weights are random at the published shape, all texts are
greedy. A server's tokens/s are all tokens of all clients, over the time from the first request to
the last byte: prompts (16 tokens each) and clients are part of it, while the loop's time begins
after its prompts. --pause measures instead for how long a prompt of 2,000 tokens holds up streams
that are going on (the longest gap between two pieces of any of them), and how long after its client
has left a place is free: in mid-answer, and while such a prompt is read."""

import argparse
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from builds import Bench

CLIENTS, MADE = 8, 224  # the loop has a context of 2048 tokens
LONG = list(range(5, 2005))  # a prompt of token ids
WORDS = "and the sea was as old as any of us could say on that long day"


def request(port: int, name: str, prompt: str | list[int], tokens: int) -> bytes:
    body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    return head.encode() + text


class Clients:
    """Sockets that are read as data comes, and looked into afterwards: the clients take as little
    as they can of the machine that they share with the server."""

    def __init__(self, port: int, name: str) -> None:
        self.port, self.name = port, name
        self.wait = selectors.DefaultSelector()
        self.texts: dict[socket.socket, bytearray] = {}
        self.times: dict[socket.socket, list[float]] = {}
        self.open = 0

    def ask(self, prompt: str | list[int], tokens: int) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port))
        sock.sendall(request(self.port, self.name, prompt, tokens))
        self.texts[sock], self.times[sock] = bytearray(), []
        self.wait.register(sock, selectors.EVENT_READ)
        self.open += 1
        return sock

    def read(self) -> None:
        for key, _ in self.wait.select():
            data = key.fileobj.recv(1 << 16)
            self.times[key.fileobj].append(time.perf_counter())
            self.texts[key.fileobj] += data
            if not data:
                self.wait.unregister(key.fileobj)
                key.fileobj.close()
                self.open -= 1

    def tokens(self, sock: socket.socket) -> int:
        text = self.texts[sock].decode()
        assert '"finish_reason":' in text.replace(" ", "") and " 200 OK" in text[:20], text[-300:]
        return text.replace(" ", "").count('"text":')


def throughput(port: int, name: str) -> float:
    """Tokens/s of all clients together."""
    clients = Clients(port, name)
    warm = clients.ask("Once", 8)
    while clients.open:
        clients.read()
    clients.tokens(warm)
    start = time.perf_counter()
    asked = [clients.ask(f"{i} {WORDS}", MADE) for i in range(CLIENTS)]
    while clients.open:
        clients.read()
    seconds = time.perf_counter() - start
    return sum(clients.tokens(sock) for sock in asked) / seconds


def longest_pause(port: int, name: str) -> tuple[float, float]:
    """Seconds between two pieces of streams, the longest, before and while a prompt of 2,000 tokens
    is read."""
    clients = Clients(port, name)
    asked = [clients.ask(f"{i} {WORDS}", 400) for i in range(4)]
    while min(len(clients.times[sock]) for sock in asked) < 60:
        clients.read()
    begun = time.perf_counter()
    long = clients.ask(LONG, 2)
    while len(clients.times[long]) < 2:
        clients.read()
    ended = clients.times[long][0]
    while clients.open:
        clients.read()

    def longest(first: float, last: float) -> float:
        gaps = [0.0]
        for sock in asked:
            times = [at for at in clients.times[sock] if first <= at <= last]
            gaps += [b - a for a, b in zip(times, times[1:], strict=False)]
        return max(gaps)

    return longest(begun - 0.3, begun), longest(begun - 0.1, ended + 0.1)


def until_free(port: int, name: str, prompt: str | list[int], wait: float) -> float:
    """Seconds from a client's leaving, so long after its answer goes on, until nothing does."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(request(port, name, prompt, 2000))
    while not going(port):
        pass
    time.sleep(wait)
    sock.close()
    left = time.perf_counter()
    while going(port):
        pass
    return time.perf_counter() - left


def going(port: int) -> float:
    """How many answers go on."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    return float(text.split("\nmobilellm_answers_going ")[1].split()[0])


def pauses(port: int, name: str) -> dict[str, float]:
    alone, beside = longest_pause(port, name)
    return {
        "longest gap, streams alone": alone,
        "longest gap, beside a prompt of 2,000 tokens": beside,
        "a place is free, left in mid-answer": until_free(port, name, WORDS, 0.3),
        "a place is free, left in mid-prompt": until_free(port, name, LONG, 0.1),
    }


@contextmanager
def serving(command: list[str], port: int, **env: str):
    process = subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{' '.join(command)} does not serve")
                time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def ours(model: Path, threads: int, measure):
    port = free_port()
    command = [sys.executable, "-m", "mobilellm_cpp", "serve", str(model), "--port", str(port)]
    with serving([*command, "--threads", str(threads), "--ctx", "8192"], port):
        return measure(port, model.stem)


def theirs(model: Path, threads: int, libraries: Path, measure):
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model)]
    command += ["--port", str(port), "--n_threads", str(threads), "--n_ctx", "2048"]
    command += [
        "--interrupt_requests",
        "False",
        "--model_alias",
        model.stem,
        "--flash_attn",
        "True",
    ]
    with serving(command, port, LLAMA_CPP_LIB_PATH=str(libraries)):
        return measure(port, model.stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="125M")
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where models are kept for the next time")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--pause", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args.folder or Path(temporary), args.shape, args.rounds)
        model = bench.model("base", args.type)
        if args.pause:
            found = [ours(model, args.threads, pauses) for _ in range(args.rounds)]
            print(f"| {args.shape} {args.type}, {args.threads} threads | ms |\n|---|---|")
            for name in found[0]:
                print(f"| {name} | {1000 * statistics.median(each[name] for each in found):.0f} |")
            return
        loop = [str(bench.ours.loop), str(model), str(args.threads), "batch", str(CLIENTS)]
        rounds: dict[str, list[float]] = {"bare loop": [], "mobilellm serve": []}
        if not args.no_peer:
            rounds["llama_cpp.server, stock"] = []
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
            done = subprocess.run([*loop, str(MADE)], capture_output=True, text=True, check=True)
            rounds["bare loop"].append(float(done.stdout))
            rounds["mobilellm serve"].append(ours(model, args.threads, throughput))
            if not args.no_peer:
                libraries = bench.stock_libraries
                rate = theirs(model, args.threads, libraries, throughput)
                rounds["llama_cpp.server, stock"].append(rate)
            print({name: round(rates[-1]) for name, rates in rounds.items()}, file=sys.stderr)
    what = f"{args.shape} {args.type}, {args.threads} threads, {CLIENTS} clients"
    print(f"| {what} | tokens/s | of the bare loop |")
    print("|---|---|---|")
    for name, rates in rounds.items():
        ratios = [a / b for a, b in zip(rates, rounds["bare loop"], strict=True)]
        print(f"| {name} | {statistics.median(rates):.0f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
