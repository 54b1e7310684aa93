"""The installed `mobilellm` command, as a user runs it."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import get_args

import pytest
from adapters import peft_model
from checkpoints import make_checkpoint, random_tensor, tensor_shapes
from gguf_edit import ARRAY, STRING, U32, rewrite
from lattices import pareto
from mobilellm_cpp.quant.types import EXACT, OUTPUT_TYPES
from mobilellm_cpp.quant.weight_type import DEFAULT_COST, WeightType
from typer.testing import CliRunner

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.cli import COMMANDS, app, make_app
from mobilellm_cpp.engine.conversation import Conversation

Q4_0 = ("--type", "q4_0")
MOBILELLM = str(Path(sysconfig.get_path("scripts")) / "mobilellm")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with checkpoints of 2 blocks, `tiny` and, with a chat template, `chatty`, and a
    cache of its own."""
    folder = tmp_path_factory.mktemp("cli")
    make_checkpoint(folder / "tiny", sharing=True)
    settings = make_checkpoint(folder / "chatty", sharing=True) / "tokenizer_config.json"
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOBILELLM_CACHE", str(folder / "cache"))
        yield folder


def run(place, *arguments, stdin=None, columns=100, file_blocks="unlimited"):
    """file_blocks: no file may have more of 1024 bytes, as if the disk were full."""
    env = {**os.environ, "MOBILELLM_CACHE": str(place / "cache"), "COLUMNS": str(columns)}
    limited = ["bash", "-c", f'ulimit -f {file_blocks}; exec "$@"', "", MOBILELLM]
    return subprocess.run(
        [*limited, *map(str, arguments)],
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        cwd=place,
        env=env,
        timeout=120,
    )


def test_little_is_imported_before_ctrl_c_is_caught():
    code = "import sys; old = set(sys.modules); import mobilellm_cpp.__main__; "
    code += "print(*sorted(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "mobilellm_cpp",
        "mobilellm_cpp.__main__",
        "mobilellm_cpp.errors",
    ]


def assert_sentence(done, *parts):
    """Exit code 1, nothing on stdout, one line on stderr that holds the parts."""
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("mobilellm: ")
    for part in parts:
        assert part in done.stderr


def test_help_is_light():
    script = (
        "import sys; sys.argv = ['mobilellm', '--help']\n"
        "from mobilellm_cpp.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'llama_cpp', 'numpy', 'gguf', 'torch', 'huggingface_hub', 'sentencepiece',\n"
        "         'prompt_toolkit', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("convert", "chat", "generate", "inspect"))


def test_a_command_alone_is_as_among_all(tmp_path):
    for name in COMMANDS:
        alone, among = (CliRunner().invoke(app, [name, "-h"]) for app in (make_app([name]), app))
        assert alone.exit_code == 0 and alone.output == among.output, name
    script = (
        "import sys; sys.argv = ['mobilellm', '--debug', 'generate', '-h']\n"
        "from mobilellm_cpp.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(*sorted(sys.modules))\n"
    )
    env = {**os.environ, "MOBILELLM_CONFIG": str(tmp_path / "none.toml")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=env, check=True)
    assert "--temperature" in done.stdout and "mobilellm_cpp.cli.serve" not in done.stdout


def test_the_types_of_the_help_are_those_of_the_converter():
    assert list(get_args(WeightType)) == [*OUTPUT_TYPES, EXACT]


def test_what_is_asked_for_at_the_end_of_the_process_is_done():
    script = (
        "import atexit, sys; sys.argv = ['mobilellm', 'generate']\n"
        "sys.stdin.close(); sys.stdin = open('/dev/null')\n"
        "atexit.register(print, 'the end')\n"
        "from mobilellm_cpp.__main__ import main\n"
        "sys.argv += ['--tokens', 'many']; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2 and done.stdout == "the end\n" and "--tokens" in done.stderr


def test_version(place):
    done = run(place, "--version")
    assert done.returncode == 0 and done.stdout.startswith("mobilellm-cpp ")


def test_the_list_of_commands_is_whole_in_80_columns(place):
    assert "..." not in run(place, "-h", columns=80).stdout.partition("Commands:")[2]


def test_demo_is_a_checkpoint(place):
    done = run(place, "convert", "demo", "-o", "d.gguf", "--type", "q8_0")
    assert done.returncode == 0 and done.stdout.startswith("d.gguf: "), done.stderr
    done = run(place, "quantize", "demo", "s.gguf", "--type", "q4_0", "--no-calibration")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()  # a table in a pipe is cut by nobody's window
    assert "perplexity" in lines[1] and lines[2].split()[0].endswith("16.gguf")


@pytest.mark.parametrize("type", ["q8_0", "balanced"])
def test_a_full_disk_names_the_file_that_was_asked_for(place, type):
    done = run(place, "convert", "tiny", "-o", "full.gguf", "--type", type, file_blocks=10)
    assert_sentence(done, "mobilellm: full.gguf cannot be written: ")
    assert not [path for path in place.iterdir() if "full" in path.name]


def test_convert(place):
    done = run(place, "convert", "tiny", "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    assert (place / "tiny-q8_0.gguf").exists()
    (line,) = done.stdout.splitlines()
    assert line.startswith("tiny-q8_0.gguf: ") and line.endswith(
        "bits a weight, 2 blocks stored, 4 layers executed"
    )


def test_convert_to_a_name_with_a_schedule(place):
    done = run(place, "convert", "tiny", "-o", "r.gguf", "--schedule", "reverse")
    assert done.returncode == 0, done.stderr
    about = json.loads(run(place, "inspect", "r.gguf", "--json").stdout)
    assert about["schedule"] == [0, 1, 1, 0] and about["sharing"] == "reverse sharing"


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        (0, r"73,728 weights are on a lattice, all exactly the checkpoint's"),
        (
            4,
            r"73,728 weights are on a lattice, [\d,]+ \(\d+\.\d%\) differ from the checkpoint's "
            r"by up to 0\.3\d%",
        ),
    ],
)
def test_convert_exact(place, bits, says):
    shapes = {n: s for n, s in tensor_shapes(2, 64, 64, 32, 128, 512, True).items() if "proj" in n}
    tensors = {n: pareto(random_tensor(n, s, 0), bits) for n, s in shapes.items()}
    make_checkpoint(place / f"pareto{bits}", tensors=tensors, sharing=True)
    done = run(place, "convert", f"pareto{bits}", "--type", "exact")
    assert done.returncode == 0 and done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first.startswith(f"pareto{bits}-exact.gguf: ") and re.fullmatch(says, second)
    about = json.loads(run(place, "inspect", f"pareto{bits}-exact.gguf", "--json").stdout)
    assert about["tensor_types"] == {"f32": 5, "bf16": 1, "q4_0" if bits else "q2_0": 14}
    done = run(place, "generate", f"pareto{bits}", "--type", "exact", "-p", "hello", "-n", "4")
    assert done.returncode == 0, done.stderr


def test_convert_exact_refuses_what_is_on_no_lattice(place):
    done = run(place, "convert", "tiny", "--type", "exact")
    assert_sentence(done, "tiny", "no matrix is on a lattice")
    assert not (place / "tiny-exact.gguf").exists()


def test_convert_an_adapter(place, tmp_path):
    peft_model(place / "tiny", target_modules=["q_proj"]).save_pretrained(tmp_path / "polite")
    done = run(place, "convert", tmp_path / "polite", "--base", "tiny")
    assert done.returncode == 0, done.stderr
    line = "polite-lora-f32.gguf: 0.0 MiB, 2 matrices of rank 4, for mobilellm files\n"
    assert done.stdout == line and done.stderr == ""
    done = run(place, "convert", tmp_path / "polite", "--base", "tiny", "--merge", "--type", "q8_0")
    assert done.returncode == 0 and "polite-merged-q8_0.gguf: " in done.stdout, done.stderr
    assert "2 matrices have the adapter polite merged into them" in done.stderr
    assert_sentence(run(place, "chat", tmp_path / "polite"), "a LoRA adapter and not a model")
    assert_sentence(run(place, "convert", "tiny", "--merge"), "tiny is not an adapter")
    done = run(place, "convert", tmp_path / "polite", "--verify")
    assert done.returncode == 0 and done.stdout.endswith("the file matches the adapter\n")


def test_convert_refuses_in_one_sentence(place, tmp_path):
    broken = make_checkpoint(tmp_path / "broken", hidden_size=...)
    done = run(place, "convert", broken, "-o", "broken.gguf")
    assert_sentence(done, "config.json", "hidden_size")
    assert not (place / "broken.gguf").exists()
    assert "Traceback" in run(place, "convert", broken, "-o", "broken.gguf", "--debug").stderr


def test_wrong_usage_is_exit_code_2(place):
    assert run(place, "convert").returncode == 2
    assert run(place, "nonsense").returncode == 2
    assert run(place, "generate", "tiny", "-n", "0").returncode == 2
    assert run(place, "convert", "tiny", "--type", "q9_9").returncode == 2
    assert run(place).returncode == 2  # no arguments: the help


def test_inspect_in_words(place):
    run(place, "convert", "tiny", "-o", "shared.gguf", "--type", "f16")
    run(place, "convert", "tiny", "-o", "base.gguf", "--schedule", "0,1", "--type", "f16")
    words = run(place, "inspect", "shared.gguf").stdout
    assert "2 blocks stored, 4 executed, immediate sharing ×2" in words
    shared = json.loads(run(place, "inspect", "shared.gguf", "--json").stdout)
    base = json.loads(run(place, "inspect", "base.gguf", "--json").stdout)
    assert (shared["architecture"], base["architecture"]) == ("mobilellm", "llama")
    # 2 blocks x 2 KV heads of 16 x K and V x 2 bytes
    assert base["kv_bytes_per_token"] == 2 * 2 * 16 * 2 * 2
    assert shared["kv_bytes_per_token"] == 2 * base["kv_bytes_per_token"]
    assert shared["tensor_types"] == {"f16": 15, "f32": 5}
    assert f"{shared['kv_bytes_per_token']:,} bytes a token" in words


def test_inspect_refuses(place, tmp_path):
    assert_sentence(run(place, "inspect", "none.gguf"), "none.gguf: no such file")
    (tmp_path / "text.gguf").write_text("hello " * 100)
    run(place, "convert", "tiny", "-o", "good.gguf")
    many = {"mobilellm.block_count": (30_000_000, U32), "mobilellm.block_schedule": None}
    rewrite(place / "good.gguf", tmp_path / "many.gguf", many)
    many_blocks = ("many.gguf: ", "block_count is 30000000")
    assert_sentence(run(place, "inspect", tmp_path / "many.gguf"), *many_blocks)
    order = {"mobilellm.block_schedule": (["a", "b"], ARRAY, STRING)}
    rewrite(place / "good.gguf", tmp_path / "order.gguf", order)
    assert_sentence(
        run(place, "inspect", tmp_path / "order.gguf"), "block_schedule is not an order"
    )
    assert_sentence(run(place, "inspect", tmp_path / "text.gguf"), "text.gguf is not a GGUF file")


def test_generate(place):
    arguments = ("generate", "tiny", "-p", "hello", "-n", "8", "--temperature", "1", "--seed", "7")
    done = run(place, *arguments)
    assert done.returncode == 0, done.stderr
    assert run(place, *arguments).stdout == done.stdout
    assert len(list((place / "cache").glob("tiny-balanced-*.gguf"))) == 1  # converted once
    assert run(place, "generate", "tiny", "-n", "8", "--seed", "7", stdin="hello").returncode == 0


def test_a_type_that_nobody_chose_is_told(place):
    told = f"tiny is used as balanced, {DEFAULT_COST}; --type chooses another type"
    options = ("generate", "-p", "a", "-n", "1")
    for _ in range(2):  # converted, and from the cache
        assert told in run(place, *options, "tiny").stderr.splitlines()
    for chosen in (("tiny", *Q4_0), ("tiny-q8_0.gguf",)):
        done = run(place, *options, *chosen)
        assert done.returncode == 0 and "--type" not in done.stderr


def test_errors_of_the_system_are_sentences(place):
    done = run(place, "inspect", "x" * 5000)
    assert_sentence(done, "File name too long")
    assert "Errno" not in done.stderr


def test_generate_refuses(place):
    assert_sentence(run(place, "generate", "none.gguf", "-p", "x"), "none.gguf: no such file")
    assert_sentence(
        run(place, "generate", "tiny", *Q4_0, "-p", "w " * 5000),
        "the context holds 2048: give a larger --ctx\n",
    )


def answers(place, questions, *, ctx=0, system=None, n=512):
    """What a Conversation in Python answers, greedily, as `chat` prints it."""
    llm = MobileLLM.from_checkpoint(place / "chatty", "q4_0", n_ctx=ctx, n_threads=1)
    talk = Conversation(llm, system, n, temperature=0.0)
    return "".join("".join(talk.answer(question)) + "\n" for question in questions)


def chat(place, *arguments, stdin=None):
    options = (*Q4_0, "-t", "1", "--temperature", "0")
    return run(place, "chat", *arguments, *options, stdin=stdin)


def test_a_text_on_a_pipe_is_one_question(place):
    text = "hello\n\n/exit is\nno command here\n"
    done = chat(place, "chatty", "-n", "6", stdin=text)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answers(place, [text.strip()], n=6) and done.stdout.strip()
    assert "the limit of 6 tokens is reached; -n changes it)" in done.stderr


def test_a_question_as_an_argument(place):
    done = chat(place, "chatty", "how are you", "-n", "6")
    assert done.returncode == 0 and done.stdout == answers(place, ["how are you"], n=6)
    both = chat(place, "chatty", "what is this?", "-n", "6", stdin="a letter\n")
    assert both.stdout == answers(place, ["a letter\n\nwhat is this?"], n=6)
    assert chat(place, "chatty", stdin="").returncode == 2  # nothing to answer


def test_lines_on_a_pipe(place):
    lines = "hello\n\nhow are you\n/exit\nunheard\n"
    done = chat(place, "chatty", "--lines", "-n", "6", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answers(place, ["hello", "how are you"], n=6)


def test_commands_on_a_pipe(place):
    done = chat(place, "chatty", "--lines", "-n", "4", stdin="/help\n/nonsense\n/clear\n")
    assert done.returncode == 1 and done.stdout == ""
    assert "/exit" in done.stderr and "/nonsense is not a command" in done.stderr


def test_chat_goes_on_when_the_context_is_full(place):
    questions = [f"tell me about number {i}" for i in range(12)]
    options = ("--lines", "--ctx", "96", "-n", "16", "-s", "be brief")
    done = chat(place, "chatty", *options, stdin="\n".join(questions))
    assert done.returncode == 0 and "the context was full: 1 question and " in done.stderr
    assert done.stdout == answers(place, questions, ctx=96, system="be brief", n=16)


def test_chat_says_when_a_message_does_not_fit_and_goes_on(place):
    options = ("--lines", "--ctx", "96", "-n", "4")
    done = chat(place, "chatty", *options, stdin="word " * 300 + "\nhi\n")
    assert done.returncode == 1 and "holds 96: give a larger --ctx\n" in done.stderr
    assert done.stdout.strip()
    assert_sentence(chat(place, "chatty", "word " * 300, *options[1:]), "the context holds 96")


def test_the_temperature_of_the_demo_model_is_its_own(place):
    run(place, "convert", "chatty", "-o", "other.gguf", *Q4_0)
    lines = "/set temperature\n/model other.gguf\n/set temp\n/set temp 0.3\n/model demo\n/set temp"
    for options, wanted in (((), "0.0 0.8 0.3 0.3"), (("--temp", "0.5"), "0.5 0.5 0.3 0.3")):
        done = run(place, "chat", "--lines", "-t", "1", *options, stdin=lines)
        shown = re.findall(r"^temperature +(\S+)", done.stderr, re.M)
        assert " ".join(shown) == wanted, done.stderr


def test_a_base_model_completes(place):
    done = chat(place, "tiny", "once upon", "-n", "6")
    llm = MobileLLM.from_checkpoint(place / "tiny", "q4_0", n_threads=1)
    assert done.stdout == "".join(llm.stream("once upon", max_tokens=6, temperature=0)) + "\n"


def test_bytes_that_are_no_text(place):
    for command in (["generate", "tiny", "-n", "2"], ["chat", "tiny", "-n", "2"]):
        env = {**os.environ, "MOBILELLM_CACHE": str(place / "cache")}
        done = subprocess.run(
            [MOBILELLM, *command], input=b"\xff hi\n", capture_output=True, cwd=place, env=env
        )
        assert done.returncode == 0, done.stderr


def test_a_terminal_without_unicode(place):
    env = {**os.environ, "MOBILELLM_CACHE": str(place / "cache"), "PYTHONIOENCODING": "ascii"}
    command = [MOBILELLM, "inspect", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=env)
    assert done.returncode == 0 and "chat template" in done.stdout
