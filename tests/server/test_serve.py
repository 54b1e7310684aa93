"""The `mobilellm serve` command, and what stands before the server."""

import signal
import subprocess
import sysconfig
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import running

MOBILELLM = str(Path(sysconfig.get_path("scripts")) / "mobilellm")
ENDLESS = {
    "model": "mobilellm-demo",
    "prompt": "The",
    "logit_bias": {"2": -100},
    "stream": True,
    "temperature": 0,
}


@contextmanager
def serving(*arguments):
    command = [MOBILELLM, "serve", "--port", "0", "--threads", "1", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        assert line.startswith("listening on "), line + process.stderr.read()
        yield process, line.split()[2]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def refused(*arguments):
    """The exit code and what was said."""
    done = subprocess.run(
        [MOBILELLM, "serve", *arguments], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr
    return done.returncode, " ".join(done.stderr.split())


def test_sigterm_lets_answers_end():
    with serving("demo") as (process, url):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "mobilellm-demo"
        code, said = refused("--port", url.rpartition(":")[2])
        assert code == 1 and said.endswith("; --port names another one")
        lines, first = [], threading.Event()

        def read():
            body = {**ENDLESS, "max_tokens": 400}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as got:
                for line in got.iter_lines():
                    lines.append(line)
                    first.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert first.wait(30)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/health", timeout=1)
        reader.join(60)
        assert process.wait(30) == 0 and process.stderr.read() == ""
        assert lines[-2] == "data: [DONE]" and '"finish_reason":"length"' in lines[-4]
        assert sum(line.startswith("data: {") for line in lines) > 200


def test_ctrl_c_ends_it_quietly():
    with serving() as (process, url):
        assert httpx.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0 and process.stderr.read() == ""


def test_wrong_ways_to_serve():
    code, said = refused("--host", "0.0.0.0")
    assert code == 2 and "set a key" in said
    assert refused("--host", "::")[0] == refused("--host", "192.168.0.7")[0] == 2
    code, said = refused("--host", "203.0.113.1", "--api-key", "k")
    assert code == 1 and said.startswith("mobilellm: cannot listen on 203.0.113.1 port 8080: ")
    code, said = refused("--port", "0", "nothing.gguf")
    assert code == 1 and "nothing.gguf" in said


def test_a_key(llm):
    with running(llm, key="sesam") as server:
        url = f"{server.url}/v1/models"
        assert httpx.get(f"{server.url}/health").status_code == 200
        for header in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "Basic sesam"}):
            got = httpx.get(url, headers=header)
            assert got.status_code == 401 and got.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(url, headers={"Authorization": "Bearer sesam"}).status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 401


def test_pages_of_others(llm):
    """A page elsewhere cannot ask: neither from its own origin nor by a name that leads here."""
    with running(llm, hosts=("127.0.0.1", "localhost")) as server:
        url = f"{server.url}/v1/models"
        assert httpx.get(url).status_code == 200
        assert httpx.get(url, headers={"Origin": server.url}).status_code == 200
        for header in ({"Origin": "https://evil.example"}, {"Host": "evil.example:80"}):
            assert httpx.get(url, headers=header).status_code == 403
        got = httpx.get(url, headers={"Origin": server.url})
        assert "access-control-allow-origin" not in got.headers
    with running(llm, origins=("https://good.example",)) as server:
        url = f"{server.url}/v1/models"
        got = httpx.get(url, headers={"Origin": "https://good.example"})
        assert got.headers["access-control-allow-origin"] == "https://good.example"
        assert httpx.get(url, headers={"Origin": "https://evil.example"}).status_code == 403
        asked = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
        assert httpx.options(url, headers=asked).status_code == 200


def test_a_large_request(llm):
    from mobilellm_cpp.server.service import Limits

    def chunks():
        for _ in range(100):
            yield b" " * 100

    with running(llm, limits=Limits(max_bytes=1000)) as server:
        url = f"{server.url}/v1/completions"
        for body in (b" " * 1001, chunks()):
            got = httpx.post(url, content=body)
            assert got.status_code == 413 and got.json()["error"]["code"] == "request_too_large"
