"""Many clients at once, a part of whom leave in mid-answer.

    .venv/bin/python tests/server/load.py        # the whole: 500 requests on 16 connections
    .venv/bin/python tests/server/load.py --model model.gguf

It fails where an answer is not what a single user gets, a place is not given back, a status is
neither 200 nor 503, or memory grows."""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from serving import running

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.cache import resolve

WORDS = "the old lighthouse keeper asks who bakes bread by the sea and why a boat sings".split()  # noqa: SIM905
KINDS = ("stream", "whole", "chat", "ollama")
PROMPTS = 24


def prompt(number: int) -> str:
    """Many begin alike."""
    draw = random.Random(number)
    return " ".join(WORDS[: draw.choice([0, 8])] + draw.choices(WORDS, k=draw.randint(1, 40)))


def tokens(number: int) -> int:
    return random.Random(number).randint(8, 40)


def alone(llm: MobileLLM, kind: str, number: int) -> str:
    asked = [{"role": "user", "content": prompt(number)}]
    given = prompt(number) if kind in ("stream", "whole") else asked
    return "".join(llm.stream(given, temperature=0, max_tokens=tokens(number)))


async def ask(client: httpx.AsyncClient, kind: str, number: int, leave: bool) -> str | int | None:
    """What is answered; a status where there is no answer; None: left."""
    n = tokens(number)
    body = {"model": "demo", "temperature": 0, "max_tokens": n, "stream": kind != "whole"}
    if kind in ("stream", "whole"):
        path, body = "/v1/completions", {**body, "prompt": prompt(number)}
    else:
        messages = [{"role": "user", "content": prompt(number)}]
        path, body = "/v1/chat/completions", {**body, "messages": messages}
    if kind == "ollama":
        options = {"temperature": 0, "num_predict": n}
        path, body = "/api/chat", {"model": "demo", "messages": messages, "options": options}
    if kind == "whole":
        if leave:
            try:
                await client.post(path, json=body, timeout=random.uniform(0.001, 0.05))
            except httpx.TimeoutException:
                return None
        got = await client.post(path, json=body)
        return got.json()["choices"][0]["text"] if got.status_code == 200 else got.status_code
    async with client.stream("POST", path, json=body) as got:
        if got.status_code != 200:
            return got.status_code
        text, lines = "", random.randint(1, 6)
        async for line in got.aiter_lines():
            lines -= bool(line)
            if leave and lines < 0:
                return None
            line = line.removeprefix("data: ")
            if not line.startswith("{"):
                continue
            value = json.loads(line)
            if kind == "ollama":
                text += value["message"]["content"]
            elif kind == "chat":
                text += value["choices"][0]["delta"].get("content", "")
            else:
                text += value["choices"][0]["text"]
        return text


async def load(url: str, expected: dict, requests: int, connections: int) -> Counter:
    """Carries the requests out; how many ended in which way."""
    ends: Counter = Counter()
    draw = random.Random(requests)
    work = [
        (draw.choice(KINDS), draw.randrange(PROMPTS), number % 3 == 0) for number in range(requests)
    ]
    limits = httpx.Limits(max_connections=connections)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def worker() -> None:
            while work:
                kind, number, leave = work.pop()
                got = await ask(client, kind, number, leave)
                if got is None:
                    ends["left"] += 1
                elif isinstance(got, int):
                    ends[f"status {got}"] += 1
                elif got == expected[kind, number]:
                    ends["right"] += 1
                else:
                    ends["wrong"] += 1
                    print(kind, number, repr(got), expected[kind, number], file=sys.stderr)

        await asyncio.gather(*(worker() for _ in range(connections)))
    return ends


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    return 0


def run(llm: MobileLLM, requests: int, connections: int) -> tuple[Counter, int]:
    """The ends of all requests, and by how many bytes memory grew in their second half. Raises
    AssertionError where a place was not given back."""
    expected = {(kind, n): alone(llm, kind, n) for kind in KINDS for n in range(PROMPTS)}
    with running(llm) as server:
        ends = asyncio.run(load(server.url, expected, requests // 2, connections))
        assert server.idle(), "work is left"
        before = resident()
        ends += asyncio.run(load(server.url, expected, requests - requests // 2, connections))
        assert server.idle(), "work is left"
        grown = resident() - before
        live = [state for state in llm._sequences.places.placed.values() if state.live]
        assert live == [], "places are not given back"
    return ends, grown


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--connections", type=int, default=16)
    args = parser.parse_args()
    start = time.perf_counter()
    with MobileLLM(resolve(args.model, None, None)) as llm:
        ends, grown = run(llm, args.requests, args.connections)
    print(f"{dict(ends)}, {grown / 2**20:.1f} MiB grown, {time.perf_counter() - start:.0f} s")
    bad = set(ends) - {"right", "left", "status 503"}
    if bad or grown > 16 << 20 or ends["right"] == 0:
        sys.exit(f"failed: {sorted(bad) or 'memory grows'}")


if __name__ == "__main__":
    main()
