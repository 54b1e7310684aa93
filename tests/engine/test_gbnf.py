"""GBNF grammars allow what llama.cpp's own grammar sampler allows, token by token."""

import ctypes
import json
import random

import jsonschema
import numpy as np
import pytest
from formed import answers, closed, demo_model

from mobilellm_cpp.engine.library import llama_cpp
from mobilellm_cpp.engine.structured import Constraint, Vocabulary


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return demo_model(tmp_path_factory.mktemp("structured"))


@pytest.fixture(scope="module")
def vocabulary(llm):
    return Vocabulary(llm._model.vocab)


class Upstream:
    """llama.cpp's own grammar."""

    def __init__(self, llm, grammar):
        self.n = llm.n_vocab()
        self.sampler = llama_cpp.llama_sampler_init_grammar(
            llm._model.vocab, grammar.encode(), b"root"
        )
        self.data = (llama_cpp.llama_token_data * self.n)()
        kinds = [("id", np.int32), ("logit", np.float32), ("p", np.float32)]
        self.rows = np.frombuffer(self.data, kinds)

    def allowed(self):
        self.rows["id"], self.rows["logit"] = np.arange(self.n), 0
        candidates = llama_cpp.llama_token_data_array(
            data=self.data, size=self.n, selected=-1, sorted=False
        )
        llama_cpp.llama_sampler_apply(self.sampler, ctypes.byref(candidates))
        return self.rows["logit"] == 0

    def accept(self, token):
        llama_cpp.llama_sampler_accept(self.sampler, token)

    def __del__(self):
        llama_cpp.llama_sampler_free(self.sampler)


def is_text(piece):
    """Not so byte tokens: llama.cpp takes some that begin no character, and NUL for none."""
    try:
        return bool(piece.decode()) and piece[:1] != b"\0"
    except UnicodeDecodeError:
        return False


def same_as_upstream(llm, vocabulary, grammar, seed, steps=25):
    draw = random.Random(seed)
    pieces = [llm._piece(token) for token in range(vocabulary.n_tokens)]
    texts = np.array([is_text(piece) for piece in pieces])
    compared = texts | (np.arange(len(texts)) == llm.token_eos())
    upstream, constraint, said = Upstream(llm, grammar), Constraint(vocabulary, gbnf=grammar), b""
    for _ in range(steps):
        logits = np.zeros(vocabulary.n_tokens, np.float32)
        constraint.mask(logits)
        allowed = logits == 0
        wrong = np.flatnonzero((allowed != upstream.allowed()) & compared)
        assert not len(wrong), f"{grammar!r} after {said!r}: {[pieces[t] for t in wrong[:5]]}"
        possible = np.flatnonzero(allowed & texts).tolist()
        if not possible:
            return
        long = [token for token in possible if len(pieces[token]) > 1]
        token = draw.choice(long if long and draw.random() < 0.5 else possible)
        upstream.accept(token)
        constraint.accept(token)
        said += pieces[token]


FILES = ["arithmetic", "c", "chess", "japanese", "json", "json_arr", "list"]


@pytest.mark.parametrize("name", FILES)
def test_the_gbnf_of_llama_cpp_allows_what_llama_cpp_allows(
    llm, vocabulary, llama_cpp_source, name
):
    grammar = (llama_cpp_source / "grammars" / f"{name}.gbnf").read_text()
    for seed in range(2):
        same_as_upstream(llm, vocabulary, grammar, seed, steps=40)


def test_answers_by_the_gbnf_for_json_are_json(llm, vocabulary, llama_cpp_source):
    grammar = (llama_cpp_source / "grammars" / "json.gbnf").read_text()
    for text in answers(llm, vocabulary, gbnf=grammar):
        json.loads(text)


def test_a_grammar_object_of_llama_cpp(llm, vocabulary):
    schema = closed(a={"type": "integer"}, b={"enum": ["x", "y"]})
    grammar = llama_cpp.LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)._grammar
    same_as_upstream(llm, vocabulary, grammar, 0)
    for text in answers(llm, vocabulary, gbnf=grammar):
        jsonschema.validate(json.loads(text), schema)


PIECES = r"""'"a"' '"b"' '"ab"' '"abc"' '[ab]' '[a-c]' '[^a]' '"é"' '[è-ê]' '"\n"' '[^"\\]' '.'"""


def drawn_grammar(seed):
    """Rules that are recursive and full of texts that begin alike."""
    draw = random.Random(seed)
    pieces = [text.strip("'") for text in PIECES.split(" ")] + ["x", "y", "z"]

    def part(depth):
        kind = draw.random()
        if depth == 0 or kind < 0.3:
            return draw.choice(pieces)
        if kind < 0.55:
            return " ".join(part(depth - 1) for _ in range(draw.randint(1, 3)))
        if kind < 0.75:
            return "(" + " | ".join(part(depth - 1) for _ in range(draw.randint(1, 3))) + ")"
        times = draw.choice(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}"])
        return f"({part(depth - 1)}){times}"

    def rule():
        first = draw.choice(['"a" ', '"b" ', "[a-c] ", '"(" '])  # no left recursion in llama.cpp
        return " | ".join(first + part(2) for _ in range(draw.randint(1, 3)))

    return "\n".join(f"{name} ::= {rule()}" for name in ("root", "x", "y", "z"))


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_drawn_grammars_allow_what_llama_cpp_allows(llm, vocabulary, first):
    for seed in range(first, first + 20):
        same_as_upstream(llm, vocabulary, drawn_grammar(seed), seed, steps=15)
