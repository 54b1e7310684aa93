"""MobileLLM as a Python object, and conversations."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint, random_tensor
from gguf_edit import BOOL, rewrite
from peer import greedy, run_on

from mobilellm_cpp import CheckpointError, MobileLLM, ModelError, convert_checkpoint
from mobilellm_cpp.engine import library, sequences
from mobilellm_cpp.engine.answers import until_stop
from mobilellm_cpp.engine.conversation import Conversation
from mobilellm_cpp.engine.inherited import _COPY
from mobilellm_cpp.engine.library import run_step
from mobilellm_cpp.engine.sampling import Sampler

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder / "plain", sharing=True, dtype="f32")
    convert_checkpoint(folder / "plain", folder / "plain.gguf", type="f32")
    make_checkpoint(folder / "template", sharing=True, dtype="f32")
    config = json.loads((folder / "template" / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (folder / "template" / "tokenizer_config.json").write_text(json.dumps(config))
    convert_checkpoint(folder / "template", folder / "template.gguf", type="f32")
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return MobileLLM(folder / "plain.gguf", n_ctx=128, n_threads=1)


def test_it_is_a_llama(llm):
    assert isinstance(llm, library.llama_cpp.Llama)
    answer = llm.create_completion("hello", max_tokens=4, temperature=0.0)
    assert answer["usage"]["completion_tokens"] == 4
    assert llm.create_chat_completion([{"role": "user", "content": "hi"}], max_tokens=2)["choices"]


def test_the_context_is_what_the_file_says(folder):
    assert MobileLLM(folder / "plain.gguf").n_ctx() == 2048


def test_greedy_stream_is_what_the_c_api_gives(llm, folder):
    prompt = llm.tokenize(b"hello there")
    (tokens,) = greedy(library.FOLDER, folder / "plain.gguf", [prompt], n=24, flash=True)
    text = b"".join(llm._piece(token) for token in itertools.takewhile(lambda t: t != 2, tokens))
    streamed = "".join(llm.stream("hello there", max_tokens=24, temperature=0.0))
    assert streamed == text.decode("utf-8", "replace")


def test_the_same_seed_gives_the_same_text(llm):
    def text(seed):
        return "".join(llm.stream("hello", max_tokens=20, temperature=1.0, seed=seed))

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(5)}) > 1


SAMPLED = """
import json, sys
import llama_cpp
path, prompt, settings = json.loads(sys.argv[1])
llm = llama_cpp.Llama(path, n_ctx=128, n_threads=1, n_threads_batch=1, flash_attn=True,
                      verbose=False)
grammar = llama_cpp.LlamaGrammar.from_string('root ::= [a-z ]+', verbose=False)
def processor(ids, logits):
    logits[: len(ids)] -= 5
    return logits
answers = []
for setting in settings:
    extra = {"grammar": grammar} if setting.pop("grammar", False) else {}
    if setting.pop("processor", False):
        extra["logits_processor"] = llama_cpp.LogitsProcessorList([processor])
    llm.set_seed(7)
    tokens = llm.generate(prompt, **setting, **extra)
    answers.append([next(tokens) for _ in range(20)])
print(json.dumps([answers, [llm.detokenize(answer).hex() for answer in answers]]))
"""
OURS_SAMPLED = SAMPLED.replace(
    "import llama_cpp\n", "from mobilellm_cpp import MobileLLM\nimport llama_cpp\n", 1
).replace("llama_cpp.Llama(path", "MobileLLM(path")
SETTINGS = [
    {"temp": 0.0},
    {"temp": 0.8},
    {"temp": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temp": 1.2, "top_k": 100, "top_p": 0.8, "typical_p": 0.9},
    {"temp": 1.4, "top_k": 128, "top_p": 1.0, "min_p": 0.0},
    {"temp": 1.3, "top_k": 129, "top_p": 1.0, "min_p": 0.0},
    {"temp": 1.6, "top_k": 1000, "top_p": 1.0, "min_p": 0.0},
    {"temp": 1.1, "top_k": 3},
    {"temp": 1.0, "repeat_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    {"temp": 1.0, "mirostat_mode": 2},
    {"temp": 1.0, "grammar": True},
    {"temp": 1.0, "processor": True},
]


@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied"])
def test_sampling_is_that_of_llama_cpp_python(llm, tied, tmp_path):
    """The same tokens for the same seed as its own loop, and the same bytes for them; also where
    pairs of tokens have equal logits."""
    path = llm.model_path
    if tied:
        rows = random_tensor("model.embed_tokens.weight", (512, 64), 0)
        rows[256:] = rows[:256]
        tensors = {"model.embed_tokens.weight": rows}
        make_checkpoint(tmp_path / "tied", dtype="f32", tensors=tensors)
        path = str(tmp_path / "tied.gguf")
        convert_checkpoint(tmp_path / "tied", path, type="f32")
    prompt = llm.tokenize(b"hello there")
    ours = run_on(library.FOLDER, OURS_SAMPLED, [path, prompt, SETTINGS])
    plain = run_on(library.FOLDER, SAMPLED, [path, prompt, SETTINGS])
    assert plain.returncode == 0 and json.loads(plain.stdout) == json.loads(ours.stdout)
    assert len({str(answer) for answer in json.loads(plain.stdout)[0]}) > len(SETTINGS) // 2


@pytest.fixture
def computed(monkeypatch):
    """How many tokens each step computes."""
    found = []

    def counted(context, step):
        found.append(step.native.n_tokens)
        return run_step(context, step)

    monkeypatch.setattr(sequences, "run_step", counted)
    return found


def test_a_conversation_that_goes_on_computes_only_what_is_new(llm, computed):
    sampling = {"max_tokens": 4, "temperature": 0.0}
    talk = llm._sequences.open([])
    first = "".join(llm._stream("a b c d", sampling, talk))
    made = len(llm.tokenize(b"a b c d"))
    assert computed[-4:] == [made, 1, 1, 1] and first
    computed.clear()
    "".join(llm._stream("a b c d e f", sampling, talk))
    assert computed[0] == len(llm.tokenize(b"a b c d e f")) - made


def test_prompts_that_begin_alike_share_what_can_be_shared_to_the_bit(files, computed):
    """In the fused step: all but the last tokens, which are computed as they would be alone."""
    prompt = [1, *range(40, 80)]
    want = MobileLLM(files["shared"], n_threads=1).logits([*prompt, 5, 6])[-1]
    llm = MobileLLM(files["shared"], n_threads=1)
    next(llm.generate(prompt))
    llm.reset()
    computed.clear()
    sequence = llm._sequences.open([*prompt, 5, 6])
    _, got = sequence.next(_COPY)
    assert computed == [13] and np.array_equal(got, want)


def test_a_token_outside_the_vocabulary_has_no_text(llm):
    for token in (-1, 512):
        with pytest.raises(ModelError, match=f"token {token} is outside the vocabulary of 512"):
            llm.detokenize([5, token])


@pytest.mark.parametrize(
    "pieces, stop, want",
    [
        (["ab", "cd"], (), "abcd"),
        (["ab", "cd", "ef"], ("bc",), "a"),
        (["a", "b", "c", "d"], ("bcd",), "a"),
        (["a", "b", "c", "x"], ("bcd",), "abcx"),
        (["aa", "ab"], ("aab",), "a"),
        (["x\nUs", "er: hi"], ("\nUser:", "\nAssistant:"), "x"),
        (["one two"], ("two", "one"), ""),
    ],
)
def test_stop_strings_across_pieces(pieces, stop, want):
    assert "".join(until_stop(iter(pieces), stop)) == want


def test_characters_of_several_tokens_come_whole(llm, monkeypatch):
    """Byte tokens of one character are put together; a broken one becomes U+FFFD."""
    smile = llm.tokenize("😀".encode(), add_bos=False)[1:]
    tokens = iter([*smile, *smile[:2], 2])
    monkeypatch.setattr(Sampler, "pick", lambda *_: next(tokens))
    assert [p for p in llm.stream("x", max_tokens=9) if p] == ["😀", "\ufffd"]


def test_a_prompt_that_does_not_fit(llm):
    with pytest.raises(ModelError, match=r"prompt has \d+ tokens, .* holds 128: .* a larger n_ctx"):
        list(llm.stream("word " * 200))


def test_generation_ends_where_the_context_does(llm):
    prompt = "a b c d e f g h " * 8
    pieces = list(llm.stream(prompt, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=3))
    assert pieces and llm.n_tokens <= 128


def test_logits_refuse_nonsense(llm):
    for tokens, sentence in [([], "no tokens"), ([1] * 129, "129 tokens"), ([512], "token 512 is")]:
        with pytest.raises(ModelError, match=sentence):
            llm.logits(tokens)


def test_seeds_do_not_stick_and_are_not_eager(llm):
    def text(**seed):
        return "".join(llm.stream("hello", max_tokens=20, temperature=1.5, min_p=0.0, **seed))

    one = text(seed=1)
    assert len({text() for _ in range(4)}) > 1
    first = llm.stream("hello", max_tokens=20, temperature=1.5, min_p=0.0, seed=1)
    llm.stream("hello", max_tokens=20, temperature=1.5, min_p=0.0, seed=2)
    assert "".join(first) == one


@pytest.mark.parametrize(
    "misuse, sentence",
    [
        (lambda llm: llm.stream([]), "messages must be a list"),
        (lambda llm: llm.stream(b"hi"), "messages must be a list"),
        (lambda llm: llm.stream(["hi"]), "messages must be a list"),
        (lambda llm: llm.chat({"role": "user", "content": "hi"}), "messages must be a list"),
        (lambda llm: llm.chat([{"content": "hi"}]), "messages must be a list"),
        (lambda llm: llm.stream("hi", max_tokens=-1), "max_tokens is -1"),
        (lambda llm: llm.embeddings("abc"), "a list of texts"),
    ],
)
def test_misuse_gets_a_sentence(llm, misuse, sentence):
    with pytest.raises(ModelError, match=sentence):
        list(misuse(llm))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"n_ctx": -1}, "n_ctx is -1"),
        ({"n_ctx": 2**40}, "n_ctx is 1099511627776"),
        ({"n_ctx": 2**28}, "GB for a context of 268435456 tokens, but .* a context of .* fits"),
        ({"n_threads": 100000}, "n_threads is 100000, outside 0 to 512"),
        ({"n_batch": -1}, "n_batch is -1"),
        ({"lora_path": "/nowhere"}, "/nowhere: no such file"),
    ],
)
def test_arguments_out_of_bounds(folder, arguments, sentence):
    with pytest.raises(ModelError, match=sentence):
        MobileLLM(folder / "plain.gguf", **arguments)


def test_a_stop_string_need_not_be_a_list(llm):
    whole = "".join(llm.stream("hello", max_tokens=20, temperature=0.0))
    cut = "".join(llm.stream("hello", max_tokens=20, temperature=0.0, stop=whole[3:6]))
    assert cut == whole[: whole.index(whole[3:6])]


def test_text_that_is_no_unicode(llm):
    assert llm.tokenize(b"a\xff") == llm.tokenize("a\ufffd".encode())
    list(llm.stream("a\udcff\ud800", max_tokens=2))
    llm.chat([{"role": "user", "content": "a\udcff"}], max_tokens=2)
    llm.embeddings(["a\udcff"])


def test_logits_take_arrays(llm):
    assert np.array_equal(llm.logits(np.array([1, 5])), llm.logits([1, 5]))


def test_non_causal_prompts_beyond_a_batch_are_no_abort(folder, tmp_path):
    """Upstream asserts in llama_decode, on our thread: the guard makes it an exception."""
    make_checkpoint(tmp_path / "c")
    convert_checkpoint(tmp_path / "c", tmp_path / "m.gguf")
    path = rewrite(
        tmp_path / "m.gguf", tmp_path / "n.gguf", {"llama.attention.causal": (False, BOOL)}
    )
    llm = MobileLLM(path, n_ctx=512, n_batch=512, n_ubatch=64, n_threads=1)
    with pytest.raises(ModelError, match="cannot be run: .*n_ubatch"):
        llm.logits([5] * 300)


def test_loading_in_several_threads_leaves_stdout_alone(folder):
    script = f"""
import threading
from mobilellm_cpp import MobileLLM
def load():
    for _ in range(4):
        MobileLLM({str(folder / "plain.gguf")!r}, n_threads=1)
threads = [threading.Thread(target=load) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.stdout == "still here\n", done.stderr


def test_streaming_after_logits_and_embeddings(llm):
    want = "".join(llm.stream("hello", max_tokens=8, temperature=0.0))
    llm.logits([1, 2, 3])
    assert "".join(llm.stream("hello", max_tokens=8, temperature=0.0)) == want
    llm.embeddings(["something else"])
    assert "".join(llm.stream("hello", max_tokens=8, temperature=0.0)) == want


def test_embeddings_of_long_texts_and_none(llm):
    assert llm.embeddings([]).shape == (0, 64)
    short = MobileLLM(llm.model_path, n_ctx=128, n_batch=8, n_threads=1)
    text = "a text of more tokens than one batch can take at a time"
    np.testing.assert_allclose(short.embeddings([text]), llm.embeddings([text]), atol=1e-5)


def test_chat_template_of_the_file(folder):
    llm = MobileLLM(folder / "template.gguf", n_threads=1)
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    parts = [
        [1],
        llm.tokenize(b"[system] be kind[user] hi[assistant] hello", add_bos=False),
        [2],
        llm.tokenize(b"[user] bye", add_bos=False),
    ]
    assert llm.chat_tokens(messages) == sum(parts, [])


def test_files_without_a_template_chat_in_plain_lines(llm):
    messages = [{"role": "user", "content": "hi"}]
    want = [1, *llm.tokenize(b"User: hi\nAssistant:", add_bos=False)]
    assert llm.chat_tokens(messages) == want


def test_no_such_file_and_no_gguf(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        MobileLLM(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=r"is a folder and not a GGUF file: `mobilellm convert`"):
        MobileLLM(tmp_path)


def test_conversion_is_cached_by_content(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILELLM_CACHE", str(tmp_path / "cache"))
    checkpoint = make_checkpoint(tmp_path / "c", sharing=True)
    first = MobileLLM.from_checkpoint(checkpoint, n_threads=1)
    (path,) = (tmp_path / "cache").glob("*.gguf")
    written = path.stat().st_mtime_ns
    assert MobileLLM.from_checkpoint(checkpoint, n_threads=1).model_path == first.model_path
    assert path.stat().st_mtime_ns == written
    make_checkpoint(checkpoint, sharing=True, seed=5)  # the same names and sizes
    second = MobileLLM.from_checkpoint(checkpoint, n_threads=1)
    assert second.model_path != first.model_path
    assert not np.array_equal(second.logits([1, 5]), first.logits([1, 5]))
    other = MobileLLM.from_checkpoint(checkpoint, type="q8_0", n_threads=1)
    assert "q8_0" in other.model_path
    with pytest.raises(CheckpointError):
        MobileLLM.from_checkpoint(tmp_path / "nothing here")
    for memory in (tmp_path / "cache").glob("*.key"):
        memory.write_text("")  # as a full disk may leave it
    assert MobileLLM.from_checkpoint(checkpoint, n_threads=1).model_path == second.model_path


def test_a_folder_with_a_space(tmp_path):
    """Our own library is no foreign one, whatever its path."""
    package = library.FOLDER.parent
    shutil.copytree(package, tmp_path / "a b" / package.name)
    shutil.copy(package.parent / "_mobilellm_cpp_library.py", tmp_path / "a b")
    make_checkpoint(tmp_path / "c")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "a b"), "MOBILELLM_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "mobilellm_cpp", "generate", str(tmp_path / "c"), "-p", "hi"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=env)
    assert done.returncode == 0, done.stderr


def test_another_libllama_is_noticed(stock_lib):
    script = """
import llama_cpp
try:
    import mobilellm_cpp.engine.model
except Exception as error:
    print(type(error).__name__, error)
"""
    done = run_on(stock_lib, script, None)
    assert "ModelError another libllama is already loaded" in done.stdout
    assert "from mobilellm_cpp before llama_cpp is imported" in done.stdout


def test_llama_cpp_after_us_is_ours():
    script = """
import mobilellm_cpp.engine.model, llama_cpp, os
print(llama_cpp.llama_cpp._base_path, "LLAMA_CPP_LIB_PATH" in os.environ)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == [str(library.FOLDER), "False"]


def test_python_started_in_the_source_folder_uses_the_installed_package():
    script = (
        "from mobilellm_cpp import MobileLLM, convert_checkpoint\n"
        "from mobilellm_cpp.engine import library\nprint(library.FOLDER)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == str(library.FOLDER), done.stderr


def test_a_conversation_outlives_its_context(folder):
    llm = MobileLLM(folder / "template.gguf", n_ctx=96, n_threads=1)
    talk = Conversation(llm, system="stay", max_tokens=24, temperature=0.0)
    for i in range(12):
        "".join(talk.answer(f"question {i}"))
    assert talk.system == [{"role": "system", "content": "stay"}]
    assert 0 < len(talk.turns) < 24
    assert talk.turns[0]["role"] == "user" and talk.turns[-2]["content"] == "question 11"


def test_a_message_that_overfills_the_context(folder):
    llm = MobileLLM(folder / "template.gguf", n_ctx=96, n_threads=1)
    talk = Conversation(llm, max_tokens=16, temperature=0.0)
    "".join(talk.answer("hello"))
    before = list(talk.turns)
    with pytest.raises(ModelError, match="the context holds 96"):
        "".join(talk.answer("word " * 200))
    assert talk.turns == before
    "".join(talk.answer("again"))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_answer_that_fails_leaves_the_conversation_as_it_was(folder, steps):
    llm = MobileLLM(folder / "template.gguf", n_ctx=96, n_threads=1)
    talk, other = (Conversation(llm, max_tokens=16, temperature=0.0) for _ in range(2))
    assert "".join(talk.answer("hello")) == "".join(other.answer("hello"))
    before, seen = list(talk.turns), []

    def watch(read):
        seen.append(read)
        if len(seen) == steps:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        list(talk.answer("and now?", watch))
    assert talk.turns == before and seen == sorted(seen)
    assert "".join(talk.answer("again")) == "".join(other.answer("again"))
    assert talk.reused > 0 and talk.dropped == 0


def test_an_interrupted_answer_is_kept(folder):
    llm = MobileLLM(folder / "template.gguf", n_ctx=96, n_threads=1)
    talk = Conversation(llm, max_tokens=24, temperature=0.0)
    pieces = talk.answer("hello")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert talk.turns[-1] == {"role": "assistant", "content": said.strip()}
    "".join(talk.answer("and now?"))
    assert len(talk.turns) == 4
