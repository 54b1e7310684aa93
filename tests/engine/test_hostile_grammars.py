"""GBNF grammars of every kind: they constrain what is sampled, or are refused with a sentence."""

import json
import re
import subprocess
import sys

import pytest
from checkpoints import make_checkpoint

from mobilellm_cpp import convert_checkpoint

GOOD = {
    "choice": 'root ::= "yes" | "no"',
    "class": "root ::= [a-z]+ [^a-z\\n]?",
    "repeats": 'root ::= ("a" "b"?){2,5} "x"{3} [0-9]{0,2}',
    "comments": '# all\nroot ::= ( "a"  # one\n | "{5,3} (((" )\n\n',
    "empty parts": 'root ::= (ws item ws)* end\nws ::= [ ]*\nitem ::= "w"\nend ::= "."',
    "right recursion": 'root ::= "a" root | "b"',
    "any": "root ::= .*",
    "long": 'root ::= "' + "a" * 100_000 + '"',
    "chain": "root ::= r0\n"
    + "".join(f"r{i} ::= r{i + 1}\n" for i in range(20_000))
    + 'r20000 ::= "a"',
    "json": r"""root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}""",
}

BAD = {
    "undefined": ('root ::= answr\nanswer ::= "yes"', "does not define the rule 'answr'"),
    "syntax": ('root ::= "yes', "unexpected end of input"),
    "syntax 2": ("root ::= (", "expecting '\\)'"),
    "syntax 3": ("root = 'a'", "expecting ::="),
    "not a grammar": ('{"type": "object"}', "expecting name"),
    "no root": ('rot ::= "a"', "no rule 'root'"),
    "empty": ("", "is empty"),
    "blank": (" \n# nothing\n\n", "is empty"),
    "left": ('root ::= expr\nexpr ::= expr "+" "1" | "1"', "'expr' can begin with itself"),
    "left in two": ('root ::= a\na ::= b "x" | "y"\nb ::= a "z"', "can begin with itself"),
    "left behind nothing": ('root ::= a root "x" | "y"\na ::= b\nb ::= c*\nc ::= "q"', "itself"),
    "itself alone": ("root ::= root", "left recursion"),
    "backwards": ('root ::= "a"{5,3}', "at least 5 and at most 3"),
    "too often": ('root ::= ("a"{1000}){1000} "b"{100000}', "sane defaults"),
    "long repeated": ('root ::= "' + "a" * 100_000 + '"{2000}', "too large"),
    "long repeated, written twice": ('root ::= "' + "a" * 9000 + '"{30}{30}', "too large"),
    "deep": ("root ::= " + "(" * 200_000 + '"a"' + ")" * 200_000, "nests more than"),
    "huge": ('root ::= "' + "a" * 2_000_000 + '"', "more than 1048576"),
    "hex": ('root ::= "\\xZZ"', "expecting 2 hex"),
    "escape": ('root ::= "\\q"', "unknown escape"),
    "token": ("root ::= <[99999999999999999999999]>", "too large a number"),
    "long token": ("root ::= <" + "a" * 100_000 + ">", "names a token of"),
    "no token": ("root ::= <nothing like it>", "invalid token"),
    "zero": ('root ::= "a\0b"', "zero byte"),
    "surrogate": ('root ::= "\ud800"', "not a LlamaGrammar of UTF-8"),
    "2^40 ways": ("root ::= r0\n" + "".join(
        f"r{i} ::= r{i + 1} | r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40 ::= "a"',
        "ambiguous"),
    "2^60 ways": ("root ::= r0\n" + "".join(
        f'r{i} ::= r{i + 1} "a" | r{i + 1} "b"\n' for i in range(60)) + 'r60 ::= "c"',
        "ambiguous"),
}  # fmt: skip

# followed for a while, then in too many ways at once
AMBIGUOUS = """root ::= [a-zA-Z0-9 ] root "b" | [a-zA-Z0-9 ] root "c" | [^\\x00] root "d" | "e\""""

USE = """
import json, sys
from mobilellm_cpp import MobileLLM, MobileLLMError
from llama_cpp import LlamaGrammar

llm = MobileLLM(sys.argv[1], n_ctx=128, n_threads=1)
for line in sys.stdin:
    try:
        grammar = LlamaGrammar.from_string(json.loads(line))
        done = llm.create_completion("a", max_tokens=24, temperature=1.0, seed=1, grammar=grammar)
        outcome = "runs: " + done["choices"][0]["text"]
    except MobileLLMError as error:
        outcome = str(error)
    print(json.dumps(outcome), flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grammars")
    make_checkpoint(folder / "c", dtype="f32")
    return convert_checkpoint(folder / "c", folder / "m.gguf", type="f32").path


def outcomes(model, grammars):
    lines = "".join(json.dumps(text) + "\n" for text in grammars.values())
    command = [sys.executable, "-c", USE, str(model)]
    done = subprocess.run(
        command, input=lines, capture_output=True, text=True, cwd="/", timeout=300
    )
    got = [json.loads(line) for line in done.stdout.splitlines()]
    names = list(grammars)
    assert done.returncode == 0, (names[len(got)], done.returncode, done.stderr[-1000:])
    assert done.stderr == ""  # upstream's parser prints there
    return dict(zip(names, got, strict=True))


def test_good_grammars(model):
    got = outcomes(model, GOOD)
    assert {name: text for name, text in got.items() if not text.startswith("runs: ")} == {}
    assert got["choice"].strip() in ("runs: yes", "runs: no")


def test_bad_grammars(model):
    got = outcomes(model, {name: text for name, (text, _) in BAD.items()})
    for name, (_, sentence) in BAD.items():
        assert not got[name].startswith("runs"), name
        assert re.search(sentence, got[name]), (name, got[name])


def test_ambiguous(model):
    got = outcomes(model, {"ambiguous": AMBIGUOUS})
    assert "in too many ways" in got["ambiguous"]
