"""Chat templates: what the published ones say, and an end to those that have none."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

import mobilellm_cpp.engine.library  # noqa: F401  # llama_cpp finds its library through it
from mobilellm_cpp import ModelError
from mobilellm_cpp.engine.templates import ChatTemplate

PUBLISHED = Path(os.environ["MOBILELLM_STOCK"]) / "models" / "templates"

DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi  there\n"},
    {"role": "assistant", "content": "ho <think>x</think> \U0001f600"},
    {"role": "user", "content": "and now?"},
]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": PARAMETERS}}
]
CALL = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
CALLED = [
    *DIALOGUE,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "123456789", "name": "f", "content": "42"},
]


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.jinja")), ids=lambda path: path.stem)
def test_published_templates(path):
    """All that llama.cpp has collected say what llama-cpp-python's environment, which is that of
    transformers, makes them say, or fail with the same words."""
    source = path.read_text()
    theirs = Jinja2ChatFormatter(source, eos_token="</s>", bos_token="<s>")
    ours = ChatTemplate(source, "<s>", "</s>")
    for arguments in [
        {"messages": DIALOGUE},
        {"messages": DIALOGUE[1:]},
        {"messages": DIALOGUE[1:2]},
        {"messages": DIALOGUE, "tools": TOOLS},
        {"messages": CALLED, "tools": TOOLS},
    ]:
        try:
            wanted = theirs(**arguments).prompt
        except Exception as error:
            if "generator is not JSON" in str(error):
                continue  # a list to ours
            with pytest.raises(ModelError) as caught:
                ours.render(**arguments)
            assert " ".join(str(error).split())[:100] in str(caught.value)
        else:
            assert ours.render(**arguments) == wanted


DOUBLING = "{%% set n = namespace(x=%s, y=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}"
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "{% block x %}{{ self.x() }}{{ self.x() }}{% endblock %}",
    DOUBLING % ("'a'", 0, "{% set n.x = n.x ~ n.x %}"),
    DOUBLING % ("'a'", 0, "{% set n.x = n.x + n.x %}"),
    DOUBLING % ("'a'", 0, "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
    DOUBLING % ("[1]", 0, "{% set n.x = n.x + n.x %}"),
    DOUBLING % ("[1]", 0, "{% set n.x = [n.x, n.x] %}") + "{{ n.x }}",
    DOUBLING % ("[1]", 0, "{% set n.x = {'a': n.x, 'b': n.x} %}") + "{{ n.x|tojson }}",
    DOUBLING % ("[1]", "[1]", "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}")
    + "{{ n.x == n.y }}",
    DOUBLING % ("3", 0, "{% set n.x = n.x * n.x %}"),
    "{{ 10 ** (10 ** 9) }}",
    "{{ 'a' * 10**10 }}",
    "{{ [1] * 10**10 }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ ('x'|attr('center'))(10**10) }}",
    "{{ ('x'|safe).ljust(10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ ['a']|map('center', 10**10)|list }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{{ '{:{}d}'.format(1, 1000000000) }}",
    "{% set s = 'a' * 1000000 %}{{ s.replace('a', s) }}",
    "{% set s = 'a' * 1000000 %}{{ s|replace('a', s) }}",
    "{% set s = 'a' * 1000000 %}{{ [s]|map('replace', 'a', s)|list }}",
    "{% set s = 'a' * 1000000 %}{{ s.join(s) }}",
    "{% set s = 'a' * 1000000 %}{{ s|join(s) }}",
    "{% set s = 'a' * 1000000 %}{{ ([s] * 10000)|join }}",
    "{% set s = '\n' * 1000000 %}{{ s|indent(1000000) }}",
    "{% set s = 'a' * 4000000 %}{% for a in range(99999) %}{{ 'b' in s }}{% endfor %}",
    "{% set s = 'a' * 4000000 %}{% for a in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "{% set x = range(99999)|list %}{{ x|select('in', x)|list|length }}",
    "{{ [1]|tojson(indent=10**10) }}",
    "{{ 1.5|round(10**9) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ lipsum(n=10**9) }}",
    "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "{{ 1" + "+1" * 30_000 + " }}",
    "{{ x }}" * 15_000,
    "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "x" * 200_000,
]

RENDER = """
import json, resource, sys
from mobilellm_cpp import ModelError
from mobilellm_cpp.engine.templates import ChatTemplate

resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for source in json.load(sys.stdin):
    try:
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])
        print("ends")
    except ModelError as error:
        print(error, flush=True)
"""


def test_endless_templates():
    """With Jinja's sandbox alone most of these run for hours or take all memory there is."""
    command = [sys.executable, "-c", RENDER]
    done = subprocess.run(
        command, input=json.dumps(ENDLESS), capture_output=True, text=True, cwd="/", timeout=600
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (ENDLESS[len(lines)][:200], done.stderr[-1000:])
    for source, line in zip(ENDLESS, lines, strict=True):
        assert line.startswith("the chat template of this file fails: "), (source[:200], line)
        assert "memory" not in line.lower(), (source[:200], line)


def test_templates_of_long_dialogues():
    """A thousand messages of a thousand characters are far from the bounds."""
    messages = [{"role": "user", "content": "x" * 1000}] * 1000
    source = (PUBLISHED / "Qwen-Qwen3-0.6B.jinja").read_text()
    prompt = ChatTemplate(source).render(messages)
    assert (
        prompt == Jinja2ChatFormatter(source, eos_token="", bos_token="")(messages=messages).prompt
    )


def test_a_broken_template_is_compiled_when_used():
    template = ChatTemplate("{% for")
    with pytest.raises(ModelError, match="the chat template of this file fails: .*'for'|expected"):
        template.render(DIALOGUE)
    with pytest.raises(ModelError, match="fails: no such role"):
        ChatTemplate("{{ raise_exception('no such role') }}").render(DIALOGUE)


def test_threads_have_budgets_of_their_own():
    template = ChatTemplate("{% for a in range(90000) %}{% endfor %}done")
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(template.render(DIALOGUE))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["done"] * 8
