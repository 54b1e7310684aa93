"""Answers of a given form: a JSON schema, a regex, a Lark or a GBNF grammar, held to by llguidance.

An answer that ends by itself parses and fits. One that max_tokens or a stop string cuts off does
not have to. llguidance is imported, and a model's vocabulary read, with the first constraint.
"""

import ctypes
import functools
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .library import llama_cpp

MAX_TEXT = 1 << 16  # characters of a regex or grammar: llguidance recurses once a rule
MAX_SCHEMA = 1 << 18
STACK = 512 << 20  # virtual memory for that recursion: 10 KB a rule at most
# What stands between the tokens of JSON: nothing, a space, or a line end and an indentation.
# Without bounds a small model writes blanks for ever.
WHITESPACE = r"\x20|\x0A[\x20\x09]{0,20}"
# Forcing would call back for tokenization; the model spells what is certain its own way.
OPTIONS = '\n%llguidance {"no_forcing": true}\n'

_stack_size = threading.Lock()  # threading.stack_size is one setting for the process


class Vocabulary:
    """The tokens of a model as llguidance wants them, made once, when first asked for.

    vocab: the llama_vocab of a loaded model.
    """

    def __init__(self, vocab: Any) -> None:
        self._vocab = vocab
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self.ends: list[int] = []  # tokens that end a text, once there is a tokenizer
        self.n_tokens = int(llama_cpp.llama_vocab_n_tokens(vocab))

    def tokenizer(self) -> Any:
        """The llguidance.LLTokenizer. Raises ModelError for a vocabulary without an end of text."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._make()
            return self._tokenizer

    def _make(self) -> Any:
        import llguidance

        texts, self.ends = self._tokens()
        if not self.ends:
            raise ModelError("the model has no end-of-text token, so no answer can be complete")
        special = [token for token, text in enumerate(texts) if not text]
        buffer = ctypes.create_string_buffer(256)
        for token in special:  # by name for Lark, which can ask for them: <|eom_id|>
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
            texts[token] = buffer.raw[:n] if n > 0 else b""
        tokens = _Tokens(texts, sorted({*special, *self.ends}), self.ends[0])
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens))

    def _tokens(self) -> tuple[list[bytes], list[int]]:
        """The bytes that each token adds to an answer, and the ids that end one."""
        piece, is_end = llama_cpp.llama_token_to_piece, llama_cpp.llama_vocab_is_eog
        size = 1 << 10
        buffer = ctypes.create_string_buffer(size)
        texts, ends = [], []
        for token in range(self.n_tokens):
            n = piece(self._vocab, token, buffer, size, 0, False)
            if n < 0:
                size = -n
                buffer = ctypes.create_string_buffer(size)
                n = piece(self._vocab, token, buffer, size, 0, False)
            texts.append(ctypes.string_at(buffer, n))
            if is_end(self._vocab, token):
                ends.append(token)
        return texts, ends


class _Tokens:
    """What llguidance.TokenizerWrapper asks for. It tokenizes nothing, see OPTIONS."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], end: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, end

    def __call__(self, text: bytes | str) -> list[int]:
        return []


class Constraint:
    """The form of one answer, followed token by token; exactly one of the forms is given.

    json_schema: a JSON schema, as a dict, a bool or JSON text. What llguidance does not know
    (`not`, `uniqueItems`, `if`, ...) is refused, never ignored. Objects that name properties get
    no others, unless additionalProperties says more.
    regex: the whole answer matches it, in the syntax of Rust's regex crate, without lookaround.
    lark: a grammar in llguidance's Lark, whose first rule is `start`. Terminals take as many
    characters as they can, as a lexer does.
    gbnf: a grammar in llama.cpp's GBNF, whose first rule is `root`.

    It is a logits processor of llama_cpp.Llama, too, for one call. Raises ModelError, in one
    sentence, for what is wrong or needs too much memory or time.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        json_schema: Any = None,
        regex: str | None = None,
        lark: str | None = None,
        gbnf: str | None = None,
    ) -> None:
        forms = {"json_schema": json_schema, "regex": regex, "lark": lark, "gbnf": gbnf}
        given = [name for name, form in forms.items() if form is not None]
        if len(given) != 1:
            raise ModelError(
                "an answer needs exactly one of the forms json_schema, regex, lark and gbnf, and "
                f"{' and '.join(given) or 'none'} {'were' if given else 'was'} given"
            )
        (self._name,) = given
        self._seen = 0  # tokens of the call it is a logits processor of
        grammar = _GRAMMARS[self._name](forms[self._name])
        self._tokenizer = vocabulary.tokenizer()
        self._n_tokens = vocabulary.n_tokens
        self._end, *self._other_ends = vocabulary.ends  # llguidance knows the first alone
        self._matcher = self._on_a_large_stack(grammar)
        self._check(self._matcher.get_error())
        self._bits = np.empty((self._n_tokens + 31) // 32, np.uint32)
        self._forbidden: npt.NDArray[np.bool_] | None = self._look()  # nothing may fit: say so now

    def mask(self, logits: npt.NDArray[np.float32]) -> None:
        """Sets the logits [n_vocab] of all tokens that may not come next to -inf. Tokens that end
        a text stay where the answer may end. Raises ModelError where nothing can follow."""
        if self._forbidden is None:
            self._forbidden = self._look()
        np.copyto(logits, -np.inf, where=self._forbidden)

    def accept(self, token: int) -> None:
        """Goes on by the token that was chosen. Raises ModelError for one that mask forbids."""
        if not 0 <= token < self._n_tokens:
            raise ModelError(f"token {token} is outside the vocabulary of {self._n_tokens}")
        if token in self._other_ends and not self._named(token):
            token = self._end
        if not self._matcher.consume_token(token):
            self._check(f"token {token} does not fit")
        self._forbidden = None

    def __call__(
        self, tokens: npt.NDArray[np.intc], logits: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """mask after all tokens, of which those at the first call are the prompt."""
        for token in tokens[self._seen :] if self._seen else ():
            self.accept(int(token))
        self._seen = len(tokens)
        self.mask(logits)
        return logits

    def _look(self) -> npt.NDArray[np.bool_]:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_stopped() and not self.finished:  # llguidance lets the answer end then
            error = self._matcher.get_error()
            self._check("nothing fits it" if error in ("",) or error.startswith("NoExt") else error)
        bytes_ = self._bits.view(np.uint8)
        allowed = np.unpackbits(bytes_, count=self._n_tokens, bitorder="little").view(np.bool_)
        allowed[self._other_ends] |= allowed[self._end]
        return ~allowed

    def _named(self, token: int) -> bool:
        """Whether the grammar itself has this token next: a Lark grammar may name those that end a
        text."""
        if self._forbidden is None:
            self._forbidden = self._look()
        return bool(self._bits[token // 32] >> np.uint32(token % 32) & 1)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and only an end of text may follow."""
        return bool(self._matcher.is_stopped() and self._matcher.is_accepting())

    def _check(self, error: str) -> None:
        if error:
            raise ModelError(f"{self._name} cannot be followed: {_sentence(error, self._name)}")

    def _on_a_large_stack(self, grammar: str) -> Any:
        """The llguidance.LLMatcher of a grammar. Rules that refer to one another nest on the stack,
        and an overflow would take the process down."""
        import llguidance

        made: list[Any] = []

        def make() -> None:
            try:
                limits = llguidance.LLParserLimits(
                    initial_lexer_fuel=300_000, step_max_items=2_000_000, verbose_errors=False
                )
                made.append(
                    llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
                )
            except BaseException as error:  # a panic in Rust is not an Exception
                made.append(error)

        with _stack_size:
            before = threading.stack_size(STACK)
            try:
                thread = threading.Thread(target=make)
                thread.start()
            finally:
                threading.stack_size(before)
        thread.join()
        if isinstance(made[0], BaseException):
            self._check(str(made[0]))
        return made[0]


def pop_form(arguments: dict[str, Any]) -> dict[str, Any]:
    """Takes the arguments of stream that name a form out of `arguments`: the arguments of
    Constraint, empty where the answer has no form. Raises ModelError for two forms."""
    form = from_response_format(arguments.pop("response_format", None))
    for name in ("json_schema", "regex", "lark", "grammar"):
        given = arguments.pop(name, None)
        if given is not None and form:
            raise ModelError(f"an answer can have only one form: leave out {name} or the other one")
        if given is not None:
            form = {"gbnf": _gbnf(given)} if name == "grammar" else {name: given}
    return form


def _gbnf(grammar: Any) -> Any:
    """The text of a llama_cpp.LlamaGrammar."""
    if getattr(grammar, "_root", "root") != "root":
        raise ModelError(f'the first rule of a grammar is "root", not "{grammar._root}"')
    return getattr(grammar, "_grammar", grammar)


def from_response_format(
    response_format: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: Any = None,
) -> dict[str, Any]:
    """The form that OpenAI's arguments of a chat completion ask for, as arguments of Constraint;
    empty where they ask for none.

    response_format: {"type": "text"}, {"type": "json_object"}, which may have a "schema", or
    {"type": "json_schema", "json_schema": {"schema": ..., "strict": ...}}. Every schema is held to
    strictly, whatever strict says.
    tool_choice: {"type": "function", "function": {"name": ...}} asks for the parameters of that one
    of tools. Raises ModelError for anything else.
    """
    if isinstance(tool_choice, Mapping):
        name = _get(tool_choice, "function", "name")
        for tool in tools or ():
            if _get(tool, "function", "name") == name is not None:
                return {"json_schema": _get(tool, "function", "parameters") or {"type": "object"}}
        raise ModelError(f"tool_choice names the function {name!r}, which is not among tools")
    if response_format is None:
        return {}
    kind = _get(response_format, "type")
    if kind == "text":
        return {}
    if kind == "json_object":
        schema = response_format.get("schema")
        return {"json_schema": {"type": "object"} if schema is None else schema}
    if kind == "json_schema":
        inner = response_format.get("json_schema")
        inner = response_format if inner is None else inner  # llama.cpp's server takes both
        schema = _get(inner, "schema")
        if schema is None:
            raise ModelError('response_format of type "json_schema" needs a json_schema.schema')
        return {"json_schema": schema}
    raise ModelError(
        f"response_format has the type {kind!r}; known are text, json_object and json_schema"
    )


def _get(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


_NOTES = {"title", "description", "default", "examples", "deprecated", "$comment", "$schema"}
_NOTES |= {"$id", "$defs", "definitions", "discriminator"}


def _joins(schema: Any) -> bool:
    """Whether somewhere several schemas are to hold for one value."""
    if isinstance(schema, Mapping):
        either = {"$ref", "anyOf", "oneOf"} & set(schema)
        if "allOf" in schema or (either and len(set(schema) - _NOTES) > 1):
            return True
        return any(_joins(part) for part in schema.values())
    return isinstance(schema, list) and any(_joins(part) for part in schema)


def _closed(schema: Any) -> Any:
    """schema, whose objects have no properties but those that it names, unless it says more. Small
    models seldom find the end of an object that may go on."""
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions"):
            if isinstance(value, Mapping):
                closed[key] = {name: _closed(part) for name, part in value.items()}
        elif key in ("anyOf", "oneOf", "prefixItems") and isinstance(value, list):
            closed[key] = [_closed(part) for part in value]
        elif key in ("items", "additionalProperties"):
            closed[key] = _closed(value)
    named, required = schema.get("properties"), schema.get("required", [])
    if (
        isinstance(named, Mapping)
        and isinstance(required, list)
        and not (
            {"patternProperties", "minProperties"} & set(schema)
            or any(r not in named for r in required)
        )
    ):
        closed.setdefault("additionalProperties", False)
    return closed


def _text(form: Any, name: str, limit: int = MAX_TEXT) -> str:
    if not isinstance(form, str):
        raise ModelError(f"{name} must be a text, not {type(form).__name__}")
    if len(form) > limit:
        raise ModelError(f"{name} has {len(form)} characters, more than {limit}")
    try:
        form.encode()
    except UnicodeEncodeError:
        raise ModelError(f"{name} contains a surrogate, which UTF-8 cannot encode") from None
    return form


@functools.cache
def _white_space() -> dict[str, Any]:
    """Between the parts of JSON: little, for a small model goes on for ever otherwise. Before
    llguidance 1.9, which guidance 0.3 does not allow, there is no such choice: none then."""
    import importlib.metadata

    major, minor = importlib.metadata.version("llguidance").split(".")[:2]
    if (int(major), int(minor)) < (1, 9):
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": WHITESPACE}


def json_rule(schema: Any) -> str:
    """What stands for a JSON value of a schema in a rule of Lark. Raises ModelError."""
    try:
        if isinstance(schema, str):
            schema = json.loads(_text(schema, "json_schema", MAX_SCHEMA))
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            raise ModelError(f"json_schema must be an object, not {json.dumps(schema)[:40]}")
        _check_counts(schema)
        if not _joins(schema):
            schema = _closed(schema)
        # the separators and blanks that a schema may ask for need not make JSON
        whole = {**schema, "x-guidance": _white_space()}
        text = json.dumps(whole, allow_nan=False)
    except RecursionError:
        raise ModelError("json_schema is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"json_schema is not JSON: {error}") from None
    return f"%json {_text(text, 'json_schema', MAX_SCHEMA)}"


def _check_counts(schema: Any) -> None:
    """llguidance counts a key that comes twice as two properties, where JSON has one."""
    if isinstance(schema, Mapping):
        least, required = schema.get("minProperties"), schema.get("required")
        named = len(required) if isinstance(required, list) else 0
        if isinstance(least, int) and least > max(1, named):
            raise ModelError(
                f"json_schema: minProperties {least} needs as many names in required, "
                f"since other keys may come twice"
            )
    if isinstance(schema, (Mapping, list)):
        for part in schema.values() if isinstance(schema, Mapping) else schema:
            _check_counts(part)


# As in Python: Rust's \w has combining marks, and its \s lacks four control characters.
_CLASSES = {"w": r"[\p{L}\p{N}_]", "W": r"[^\p{L}\p{N}_]", "S": r"[^\s\x1C-\x1F]"}


def _from_regex(regex: Any) -> str:
    import llguidance

    def in_rust(escape: re.Match[str]) -> str:
        if not escape[1]:
            raise ModelError("regex ends in a backslash")
        return _CLASSES.get(escape[1], escape[0])

    pattern = re.sub(r"\\(.?)", in_rust, _text(regex, "regex"), flags=re.DOTALL)
    if not pattern:
        return f'start: ""{OPTIONS}'
    return f"start: /{llguidance.regex_to_lark(pattern, '')}/{OPTIONS}"


def _from_gbnf(gbnf: Any) -> str:
    from .lexemes import gbnf_to_lark  # takes milliseconds to import

    return gbnf_to_lark(_text(gbnf, "gbnf")) + OPTIONS


_GRAMMARS: dict[str, Callable[[Any], str]] = {
    "json_schema": lambda schema: f"start: {json_rule(schema)}{OPTIONS}",
    "regex": _from_regex,
    "lark": lambda lark: _text(lark, "lark") + OPTIONS,
    "gbnf": _from_gbnf,
}


def _sentence(error: str, name: str) -> str:
    """The one line of llguidance's message that says what is wrong."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no reason given"]
    reason = next((line[7:] for line in lines if line.startswith("error: ")), lines[0])
    if reason.startswith("panic: "):
        return "llguidance cannot read it"
    if name != "lark":  # where in the text that was made for llguidance
        reason = re.sub(r"^(at )?\d+\(\d+\): (failed to compile JSON schema: )?", "", reason)
    return reason if len(reason) <= 300 else reason[:300] + "..."
