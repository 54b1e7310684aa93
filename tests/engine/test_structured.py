"""Answers of a given form parse and fit: JSON schemas, regexes and Lark grammars."""

import json
import random
import re
import subprocess
import sys
import threading

import jsonschema
import numpy as np
import pytest
from checkpoints import make_r1
from formed import answer, answers, closed, demo_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilellm_cpp import MobileLLM, ModelError, convert_checkpoint
from mobilellm_cpp.engine.structured import Constraint, Vocabulary, from_response_format


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return demo_model(tmp_path_factory.mktemp("structured"))


@pytest.fixture(scope="module")
def vocabulary(llm):
    return Vocabulary(llm._model.vocab)


@pytest.fixture(scope="module")
def r1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("structured")
    convert_checkpoint(make_r1(folder / "r1"), folder / "r1.gguf", type="f32")
    return MobileLLM(folder / "r1.gguf", n_ctx=256, n_threads=1)


TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "v": {"type": "integer", "minimum": 0, "maximum": 99},
                "c": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
            },
            "required": ["v"],
            "additionalProperties": False,
        }
    },
}


SCHEMAS = [
    closed(name={"type": "string", "maxLength": 12}, n={"type": "integer"}),
    closed(e={"enum": ['a"b', "é\n", "\u2028", 1.5, None, True, {"x": []}]}),
    {"enum": ["it's", "\\", "日本", ""]},
    {"const": {"a": [1, "\x01 }"]}},
    {"type": "string", "minLength": 2, "maxLength": 3},
    {"type": "string", "pattern": "^[é-ü]{2,3}$"},
    {"type": "string", "pattern": "b", "maxLength": 9},
    {"type": "string", "pattern": r"^\d{2}/\w+$", "maxLength": 9},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "uuid"},
    {"type": "integer", "minimum": -3, "maximum": 17},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    {"type": "number", "exclusiveMinimum": 0.5, "maximum": 1.25},
    {"type": ["integer", "null", "boolean"]},
    {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
    {"allOf": [closed(a={"type": "integer"}), {"properties": {"a": {"minimum": 5}}}]},
    closed(**{'a"b': {"type": "integer"}, "é\\": {"type": "null"}}),
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    {
        "type": "object",
        "patternProperties": {"^a.?$": {"type": "null"}},
        "additionalProperties": False,
        "minProperties": 1,
    },
    {"type": "object", "required": ["z"], "maxProperties": 1},
    {"required": ["z"], "minimum": 3},
    {"type": "array", "maxItems": 0},
    TREE,
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_answers_fit_their_schema(llm, vocabulary, schema):
    checker = jsonschema.FormatChecker()
    for text in answers(llm, vocabulary, json_schema=schema):
        jsonschema.validate(json.loads(text), schema, format_checker=checker)


@pytest.mark.parametrize(
    "regex",
    [
        "(foo|bar) [0-9]{1,3}",
        r"\d{3}-\w\W\S",
        r"[^\W\d]{3}/",
        r"é+ü?[à-ö]",
        r"a/b\/c",
        "line\nline",
        "(?i)yes|no",
        "^anchored$",
        "",
    ],
)
def test_answers_match_their_regex(llm, vocabulary, regex):
    for text in answers(llm, vocabulary, regex=regex):
        assert re.fullmatch(regex, text)


def test_lark(llm, vocabulary):
    grammar = 'start: item ("," item)*\nitem: NAME "=" value\nvalue: /[0-9]{1,3}/ | "(" value ")"\n'
    grammar += "NAME: /[a-z]{1,5}/  // a name\n"
    for text in answers(llm, vocabulary, lark=grammar):
        assert re.fullmatch(r"([a-z]{1,5}=\(*\d{1,3}\)*,?)+", text)
        assert text.count("(") == text.count(")")


def test_special_tokens_and_all_ends_of_a_byte_level_vocabulary(r1):
    vocabulary = Vocabulary(r1._model.vocab)
    schema = closed(s={"type": "string", "maxLength": 3}, n={"enum": [1, 22, "é日"]})
    for text in answers(r1, vocabulary, json_schema=schema, n=3):
        jsonschema.validate(json.loads(text), schema)
    constraint = Constraint(vocabulary, regex="a?")
    logits = np.zeros(vocabulary.n_tokens, np.float32)
    constraint.mask(logits)
    n = vocabulary.n_tokens
    allowed = {int(token) for token in np.flatnonzero(logits == 0)}
    ends = {n - 7, n - 4, n - 3}
    assert allowed == ends | set(r1.tokenize(b"a", add_bos=False))
    for end in ends:
        constraint = Constraint(vocabulary, regex="a?")
        constraint.accept(end)
        assert constraint.finished


def test_an_answer_is_finished_where_only_its_end_may_follow(llm, vocabulary):
    a = next(token for token in range(vocabulary.n_tokens) if llm._piece(token) == b"a")
    constraint = Constraint(vocabulary, regex="aa?")
    assert not constraint.finished
    constraint.accept(a)
    assert not constraint.finished  # it may end and may go on
    constraint.accept(a)
    assert constraint.finished
    logits = np.zeros(vocabulary.n_tokens, np.float32)
    constraint.mask(logits)
    assert np.flatnonzero(logits == 0).tolist() == [llm.token_eos()]


def test_white_space_has_an_end(vocabulary, llm):
    constraint = Constraint(vocabulary, json_schema={"type": "object"})
    pieces = [llm._piece(token) for token in range(vocabulary.n_tokens)]
    blanks = [token for token, piece in enumerate(pieces) if piece and not piece.strip()]
    text = b""
    for token in [pieces.index(b"{")] + [None] * 99:
        logits = np.zeros(vocabulary.n_tokens, np.float32)
        constraint.mask(logits)
        token = next((t for t in blanks if logits[t] == 0), None) if token is None else token
        if token is None:
            return
        constraint.accept(token)
        text += pieces[token]
    pytest.fail(f"{text!r}: no end")


BAD = [
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": "a\\"}, "backslash"),
    ({"regex": r"(?=a)b"}, "look-around"),
    ({"regex": 3}, "not int"),
    ({"regex": "\ud800"}, "surrogate"),
    ({"regex": "a" * 70_000}, "70000 characters"),
    ({"lark": "start: x"}, 'unknown name: "x"'),
    ({"lark": ""}, "no start rule"),
    ({"lark": "start: " + "(" * 20_000}, "nested"),
    ({"lark": "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60))}, ""),
    ({"gbnf": 'root ::= answr\nanswer ::= "yes"'}, '"answr" in "root"'),
    ({"gbnf": ""}, '"root"'),
    ({"gbnf": 'root ::= "a'}, "line 1: a text has no end"),
    ({"gbnf": "root ::= [a-"}, "no end"),
    ({"gbnf": 'root ::= "a"\n\nb "x"'}, 'line 3: "::=" expected'),
    ({"gbnf": "root ::= *"}, "nothing stands before"),
    ({"gbnf": 'root ::= "a"{3,2}'}, "repeats"),
    ({"gbnf": 'root ::= "\\q"'}, "escape"),
    ({"gbnf": "root ::= <[12]>"}, "tokens are not supported"),
    ({"gbnf": "root ::= " + "(" * 20_000}, "parentheses"),
    ({"gbnf": "root ::= []"}, "without characters"),
    ({"gbnf": "\n".join(f"r{i} ::= r{i + 1}" for i in range(4000)) + '\nr4000 ::= "a"'}, "root"),
    ({"json_schema": {"type": "objec"}}, "Invalid type: objec"),
    ({"json_schema": "{"}, "is not JSON"),
    ({"json_schema": 3}, "must be an object"),
    ({"json_schema": False}, "must be an object"),
    ({"json_schema": {"const": float("nan")}}, "is not JSON"),
    ({"json_schema": {"const": object()}}, "is not JSON"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json_schema": {"not": {}}}, "not"),
    ({"json_schema": {"enum": []}}, "Unsatisfiable"),
    ({"json_schema": {"$ref": "#"}}, "nothing fits it"),
    ({"json_schema": {"$ref": "#/$defs/missing"}}, "missing"),
    ({"json_schema": {"$ref": "https://example.com/schema"}}, "https://example.com/schema"),
    ({"json_schema": {"minProperties": 2}}, "minProperties 2"),
    ({"json_schema": '{"items":' * 50_000 + "{}" + "}" * 50_000}, ""),
    ({"json_schema": {"type": "string", "pattern": "(a"}}, "unclosed group"),
    ({}, "none was given"),
    ({"regex": "a", "lark": "start: /a/"}, "regex and lark"),
]


@pytest.mark.parametrize(("form", "reason"), BAD, ids=lambda value: str(value)[:50])
def test_what_is_wrong_is_said_in_one_sentence(vocabulary, form, reason):
    with pytest.raises(ModelError) as error:
        Constraint(vocabulary, **form)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_deep_schemas_and_grammars_do_no_harm(vocabulary):
    """Each used to end the process: llguidance recurses once a reference."""
    deep: dict = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(ModelError, match="nested too deeply"):
        Constraint(vocabulary, json_schema=deep)
    chain = {f"a{i}": closed(x={"$ref": f"#/$defs/a{i + 1}"}) for i in range(1500)}
    chain["a1500"] = {"type": "integer"}
    Constraint(vocabulary, json_schema={"$ref": "#/$defs/a0", "$defs": chain})
    rules = "\n".join(f"a{i}: a{i + 1}" for i in range(4000))
    Constraint(vocabulary, lark=f'start: a0\n{rules}\na4000: "x"')
    rules = "\n".join(f"r{i} ::= r{i + 1}" for i in range(4000))
    with pytest.raises(ModelError, match="nested too deeply"):
        Constraint(vocabulary, gbnf=f'root ::= r0\n{rules}\nr4000 ::= "x"')
    nested = "(" * 99 + "root" + ' "x")?' * 99
    Constraint(vocabulary, gbnf=f'root ::= "a" {nested}')


def test_a_token_that_does_not_fit_is_refused(vocabulary):
    constraint = Constraint(vocabulary, regex="a")
    with pytest.raises(ModelError, match="does not fit"):
        constraint.accept(2)
    for token in (-1, vocabulary.n_tokens):
        with pytest.raises(ModelError, match="outside the vocabulary"):
            Constraint(vocabulary, regex="a").accept(token)


numbers = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number"])},
    optional={"minimum": st.integers(-50, 0), "maximum": st.integers(1, 99)},
)
strings = st.fixed_dictionaries(
    {"type": st.just("string"), "maxLength": st.integers(2, 8)},
    optional={"minLength": st.integers(0, 2), "pattern": st.sampled_from(["a", "^[a-zé]*$"])},
)
values = st.fixed_dictionaries(
    {"enum": st.lists(st.integers() | st.text(max_size=4) | st.none(), min_size=1, max_size=3)}
)
leaves = numbers | strings | values | st.sampled_from([{"type": "boolean"}, {"type": "null"}])


def branches(schemas):
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": schemas, "maxItems": st.integers(1, 2)},
        optional={"minItems": st.integers(0, 1)},
    )
    objects = st.builds(
        lambda properties, n, more: {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:n],
            "additionalProperties": more,
        },
        st.dictionaries(st.text(max_size=4), schemas, max_size=3),
        st.integers(0, 3),
        st.just(False) | schemas,
    )
    choices = st.builds(lambda parts: {"anyOf": parts}, st.lists(schemas, min_size=1, max_size=3))
    return arrays | objects | choices


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schema=st.recursive(leaves, branches, max_leaves=6), seed=st.integers(0, 999))
def test_answers_fit_any_schema(llm, vocabulary, schema, seed):
    text = answer(llm, Constraint(vocabulary, json_schema=schema), seed, max_tokens=80)
    if text is not None:
        jsonschema.validate(json.loads(text), schema)


def test_constraints_of_many_threads(llm, vocabulary):
    expected = [answer_alone(vocabulary, seed) for seed in range(8)]
    fresh = Vocabulary(llm._model.vocab)  # made by whoever comes first
    found: dict = {}

    def run(seed):
        found[seed] = answer_alone(fresh, seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(8)] == expected


def answer_alone(vocabulary, seed):
    """Tokens drawn from what a schema allows."""
    draw = random.Random(seed)
    constraint, tokens = Constraint(vocabulary, json_schema=TREE), []
    while not constraint.finished and len(tokens) < 30:
        logits = np.zeros(vocabulary.n_tokens, np.float32)
        constraint.mask(logits)
        tokens.append(draw.choice(np.flatnonzero(logits == 0).tolist()))
        constraint.accept(tokens[-1])
    return tokens


def test_response_formats():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    inner = {"name": "x", "schema": schema}
    for response_format, expected in [
        (None, {}),
        ({"type": "text"}, {}),
        ({"type": "json_object"}, {"json_schema": {"type": "object"}}),
        ({"type": "json_object", "schema": schema}, {"json_schema": schema}),
        ({"type": "json_schema", "json_schema": inner}, {"json_schema": schema}),
        ({"type": "json_schema", "schema": schema}, {"json_schema": schema}),
        (
            {"type": "json_schema", "json_schema": {**inner, "strict": True}},
            {"json_schema": schema},
        ),
    ]:
        assert from_response_format(response_format) == expected
    for wrong in [{}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "x": 1}, 3]:
        with pytest.raises(ModelError):
            from_response_format(wrong)


def follows(llm, vocabulary, schema, text):
    """Whether a text, given token by token as short as can be, fits as a whole."""
    constraint = Constraint(vocabulary, json_schema=schema)
    pieces = [llm._piece(token) for token in range(vocabulary.n_tokens)]
    for byte in text.encode():
        logits = np.zeros(vocabulary.n_tokens, np.float32)
        constraint.mask(logits)
        token = next(
            (t for t, p in enumerate(pieces) if p == bytes([byte]) and not logits[t]), None
        )
        if token is None:
            return False
        constraint.accept(token)
    logits = np.zeros(vocabulary.n_tokens, np.float32)
    constraint.mask(logits)
    return logits[llm.token_eos()] == 0


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        ({"properties": {"a": {}}, "type": "object"}, '{"a":1}', True),
        ({"properties": {"a": {}}, "type": "object"}, '{"a":1,"b":2}', False),
        ({"properties": {"a": {}}, "additionalProperties": True}, '{"a":1,"b":2}', True),
        ({"properties": {"a": {}}, "required": ["b"], "type": "object"}, '{"b":2}', True),
        ({"items": {"properties": {}}, "type": "array"}, '[{"b":2}]', False),
        ({"properties": {"properties": {"properties": {}}}}, '{"properties":{"b":2}}', False),
        ({"enum": [{"properties": {}}]}, '{"properties":{}}', True),
        (
            {"allOf": [{"properties": {"a": {}}}, {"required": ["b"]}], "type": "object"},
            '{"a":1,"b":2}',
            True,
        ),
        (
            {
                "$defs": {"base": {"type": "object", "properties": {"a": {}}}},
                "$ref": "#/$defs/base",
                "properties": {"b": {}},
            },
            '{"a":1,"b":2}',
            True,
        ),
        (
            {"properties": {"a": {}}, "anyOf": [{"required": ["b"]}, {"required": ["c"]}]},
            '{"a":1,"b":2}',
            True,
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_objects_that_name_properties_get_no_others(llm, vocabulary, schema, text, fits):
    assert follows(llm, vocabulary, schema, text) == fits


def test_a_chosen_tool_asks_for_its_parameters():
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    choice = {"type": "function", "function": {"name": "weather"}}
    assert from_response_format(None, tools, choice) == {"json_schema": parameters}
    assert from_response_format(None, tools, "auto") == {}
    with pytest.raises(ModelError, match="'sun'"):
        from_response_format(None, tools, {"type": "function", "function": {"name": "sun"}})


def test_who_wants_no_form_loads_nothing_for_it():
    code = "import sys, mobilellm_cpp; mobilellm_cpp.MobileLLM; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"llguidance", "mobilellm_cpp.engine.lexemes"} & set(done.stdout.split())
