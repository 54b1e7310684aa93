"""`mobilellm chat` in a terminal, as a person uses it."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from adapters import peft_model
from checkpoints import make_checkpoint, random_tensor
from terminal import Terminal

from mobilellm_cpp import MobileLLM, convert_adapter, convert_checkpoint

MOBILELLM = str(Path(sysconfig.get_path("scripts")) / "mobilellm")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
)
# random, so its answers never end; so small that an endless answer is cheap
ENDLESS = ("-t", "1", "--temperature", "3", "--ctx", "200000", "-n", "190000", "--seed", "1")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files of a random model: one with a chat template, one of a base model."""
    folder = tmp_path_factory.mktemp("models")
    for name, template in (("chat", TEMPLATE), ("base", None)):
        embedding = random_tensor("model.embed_tokens.weight", (512, 64), 0)
        embedding[2] = 0  # an end of text that is never among the likely tokens
        tensors = {"model.embed_tokens.weight": embedding}
        more = {"tensors": tensors, "max_position_embeddings": 200_000}
        make_checkpoint(folder / name, sharing=True, **more)
        path = folder / name / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
        convert_checkpoint(folder / name, folder / f"{name}.gguf", type="q4_0")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def person(tmp_path, cache, models):
    """Starts chats of a person who has a home of their own. Gives terminals."""
    open_ones = []
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "MOBILELLM_CACHE": str(cache),
    }

    class Person:
        env = environment

        def chat(self, *arguments, rows=24, columns=80):
            command = [MOBILELLM, "chat", *map(str, arguments)]
            return self.run(command, rows, columns)

        def run(self, command, rows=24, columns=80):
            terminal = Terminal(command, env=environment, rows=rows, columns=columns)
            open_ones.append(terminal)
            return terminal

        def files(self):
            return sorted((tmp_path / "data" / "mobilellm-cpp" / "chats").glob("*.jsonl"))

        def lines(self):
            (path,) = self.files()
            return [json.loads(line) for line in path.read_text().splitlines()]

    yield Person()
    for terminal in open_ones:
        terminal.child.close(force=True)


def leave(terminal):
    terminal.type("\x04")
    assert terminal.end() == 0


def test_history_search_and_completion(person):
    chat = person.chat("-t", "1")
    chat.wait("^>")
    chat.type("Who is the baker?\r")
    chat.wait("Marta Bell")
    chat.type("/cle")
    chat.wait("begin a new conversation")
    chat.type("ar\r")
    chat.wait("a new conversation", after="/clear")
    leave(chat)
    chat = person.chat("-t", "1")
    chat.wait("^>")
    chat.type("\x12baker")  # reverse search, over what an earlier run kept
    chat.wait("Who is the baker")
    chat.type("\r\x05\x7f then?\r")  # and edited at its end
    chat.wait("^> Who is the baker then\\?\n.*\\w")
    leave(chat)


def test_no_command_goes_to_the_model(person, tmp_path):
    (tmp_path / "my notes.txt").write_text("Marta")
    chat = person.chat("-t", "1")
    chat.wait("^>")
    for line, said in (
        ("/sett temperature 1", "did you mean /set"),
        ("/set temperature 0.5", "temperature +0.5"),
        ("/set parameter temp 0.6", "temperature +0.6"),
        ("/set temperature high", "temperature is a number"),
        ("/set top_p 7", "top_p is 7.0, outside 0 to 1"),
        ("/set schema {", "json_schema is not JSON"),
        ("/set nonsense 1", "no setting nonsense"),
        ("/set top_k", "tokens; 0:\n {29}all"),  # a table keeps its columns
        ("/set grammar none.gbnf", "none.gbnf: No such file"),
        ("/set system be kind", "instructions: be kind"),  # as in Ollama
        ("/read nofile", "No such file"),
        ('/read "~/my notes.txt"', r"notes.txt\s\(1\s+token\)\s+goes"),
        ("/model none.gguf", "none.gguf: no such file"),
        ("/model ~/none.gguf", "^mobilellm: /[^:]+none.gguf: no such file"),
        ("/lora none.gguf", "none.gguf"),
        ("/help set", "show or change settings"),
        ("/bye now?", "\\Z"),
    ):
        chat.type(line + "\r")
        chat.wait(said, after=line)
    assert chat.end() == 0
    assert person.files() == []


def test_ctrl_z_at_the_prompt(person):
    shell = person.run(["bash", "--norc", "-i"])
    shell.type(f"{MOBILELLM} chat -t 1\r")
    shell.wait("^>")
    shell.type("Who is the\x1a")
    shell.wait("Stopped")
    shell.type("fg\r")
    shell.wait("^> Who is the", after="Stopped")
    shell.type(" baker?\r")
    shell.wait("Marta Bell")
    shell.type("/bye\r")
    shell.wait("[$#] *$", after="/bye")
    shell.type("exit\r")
    shell.end()


def test_adapters(person, models, tmp_path):
    """What PEFT saved changes answers, by its scale, until it is turned off."""
    (tmp_path / "peft").mkdir()
    peft_model(models / "chat").save_pretrained(tmp_path / "peft")
    adapter = tmp_path / "adapter.gguf"
    convert_adapter(tmp_path / "peft", adapter, base=models / "chat")
    texts = ["Who are you?", f"/lora {adapter}", "/regen", f"/lora {adapter} 0.5", "/regen"]
    texts += ["/lora off", "/regen"]
    command = [MOBILELLM, "chat", str(models / "chat.gguf"), "--lines", "--temperature", "0"]
    done = subprocess.run(
        [*command, "-n", "6", "-t", "1"],
        input="\n".join([*texts, f"/lora {tmp_path / 'peft'}", ""]).encode(),
        env=person.env,
        capture_output=True,
    )
    said = done.stdout.decode().splitlines()
    wanted = []
    for lora in ([], [(adapter, 1.0)], [(adapter, 0.5)], []):
        with MobileLLM(models / "chat.gguf", n_threads=1, lora=lora) as llm:
            messages = [{"role": "user", "content": texts[0]}]
            wanted.append(llm.chat(messages, temperature=0, max_tokens=6))
    assert said == [" ".join(text.splitlines()) for text in wanted]
    assert len(set(said)) == 3
    assert b"is a folder and not a GGUF file: `mobilellm convert`" in done.stderr
    once = [*command[:3], "--temperature", "0", "-n", "6", "-t", "1", texts[0]]
    for scale, answer in (("", said[1]), (":0.5", said[2])):
        done = subprocess.run(
            [*once, "--lora", f"{adapter}{scale}"], env=person.env, capture_output=True, text=True
        )
        assert done.stdout == f"{answer}\n", done.stderr


def test_several_lines(person):
    chat = person.chat("-t", "1")
    chat.wait("^>")
    chat.type('"""\rWho is\rthe baker?"""\r')
    chat.wait("Marta")
    chat.type("Where does\x1b\rshe live?\r")
    chat.wait("lives", after="she live?")
    chat.type("thank you\\\rgoodbye\r")
    chat.wait("^>$", after="goodbye")
    leave(chat)
    asked = [line["content"] for line in person.lines() if line.get("role") == "user"]
    assert asked == ["Who is\nthe baker?", "Where does\nshe live?", "thank you\ngoodbye"]


def test_a_paste_of_200_lines_is_one_question(person, models):
    chat = person.chat(models / "chat.gguf", "-t", "1", "-n", "3")
    chat.wait("^>")
    pasted = "".join(f"/line {i} of what was pasted\n" for i in range(200))
    chat.paste(" " + pasted + "the end")
    chat.wait("the end")
    assert person.files() == []  # nothing was asked yet
    chat.type("\r")
    chat.wait("cut off: the limit of 3 tokens is reached; /set max_tokens changes it")
    leave(chat)
    (question,) = [line["content"] for line in person.lines() if line.get("role") == "user"]
    assert question == (" " + pasted + "the end").strip()


def test_ctrl_c_while_a_text_is_read(person, models, tmp_path):
    (tmp_path / "long.txt").write_text("hello how are you " * 7_000)
    chat = person.chat(models / "chat.gguf", *ENDLESS)
    chat.wait("^>")
    chat.type("hello\r")
    chat.wait("tokens/s, Ctrl-C stops")
    chat.type("\x03")
    chat.wait("as it was")
    chat.type("/read ~/long.txt what is this?\r")
    chat.wait(r"reading ━*─+ \d+ of \d+ tokens")
    chat.type("\x03")
    chat.wait("as it was", after="what is this", seconds=20)
    chat.type("/set max_tokens 5\r")
    chat.wait("max_tokens +5")
    chat.type("so?\r")
    chat.wait("the limit of 5 tokens", after="so?", seconds=20)
    leave(chat)
    lines = person.lines()
    assert lines[-1]["role"] == "assistant" and lines[-2] == {"role": "user", "content": "so?"}
    assert lines[-3] == {"keep": 0}


def test_ctrl_c_in_an_answer_leaves_the_conversation_as_it_was(person, models):
    chat = person.chat("-t", "1")
    chat.wait("^>")
    chat.type("Who is the baker?\r")
    chat.wait("Marta Bell")
    chat.type(f"/model {models}/chat.gguf\r")
    chat.wait("of context", after="/model")
    chat.type("/set temperature 3\r/set max_tokens 8000\rgo on\r")
    chat.wait("tokens/s, Ctrl-C stops")
    chat.type("\x03")
    chat.wait("^>$", after="as it was")
    chat.type("\x03")
    chat.wait("leaves")
    chat.type("/model demo\r")
    chat.wait("1024 tokens of context", after="/model demo")
    chat.type("/set temperature 0\rWhere does she live?\r")
    chat.wait("Mill Lane")
    chat.type("/undo\r")
    chat.wait("taken back: Where")
    leave(chat)
    assert person.lines()[-1] == {"keep": 2}


def test_regenerate_and_edit(person, tmp_path):
    chat = person.chat("-t", "1")
    chat.wait("^>")
    chat.type("Who is the baker?\r")
    chat.wait("Marta Bell")
    chat.type("/regen\r")
    chat.wait("Marta Bell", after="/regen")
    chat.type("/edit\r")
    chat.wait("^> Who is the baker", after="/edit")
    chat.type("\x01\x0bhi, who are you?\r")
    chat.wait("Pip", after="who are you?")
    copy, other = tmp_path / "c.jsonl", tmp_path / "o.txt"
    other.write_text("a letter")
    for _ in range(2):
        chat.type(f"/save {copy}\r")
        chat.wait("saved to", after="/save")
    chat.type(f"/save {other}\r")
    chat.wait("no conversation: JSON")
    leave(chat)
    assert other.read_text() == "a letter"
    saved = [json.loads(line) for line in copy.read_text().splitlines()]
    assert [line.get("content") for line in saved][1] == "hi, who are you?" and len(saved) == 3


def test_a_window_that_changes_its_size(person, models):
    options = ("-t", "1", "--temperature", "2", "--seed", "5", "-n", "1500")
    chat = person.chat(models / "chat.gguf", *options)
    chat.wait("^>")
    chat.type("tell me\r")
    for rows, columns in ((24, 100), (10, 100), (30, 100)):
        chat.wait("Ctrl-C stops")
        chat.resize(rows, columns)
    chat.wait("the limit of 1500 tokens is reached", seconds=60)
    leave(chat)
    said = next(line["content"] for line in person.lines() if line.get("role") == "assistant")
    shown = "".join(chat.text().split())
    words = [word for word in said.split() if word.isalpha() and len(word) > 2]
    missing = [word for word in words if word not in shown]
    assert len(words) > 20 and not missing


def test_a_full_context_lets_the_oldest_turns_go(person):
    chat = person.chat("-t", "1", "--ctx", "256", "-s", "You are Pip.", "-n", "32")
    chat.wait("^>")
    for i in range(12):
        chat.type(f"Who is the baker of house {i}?\r")
        chat.wait(r"\w.*\n>$", after=f"house {i}?")
        if "have left it" in chat.text():
            break
    assert "the context was full" in chat.text()
    chat.type("/stats\r")
    chat.wait("of them were known", after="/stats")
    chat.type("And where is the school?\r")
    chat.wait(r"\w.*\n>$", after="school?")
    chat.type("/stats\r")
    text = chat.wait("of them were known", after="school?")
    line = next(line for line in reversed(text.splitlines()) if "of them were known" in line)
    known, read = int(line.split()[0]), int(line.split("known, ")[1].split()[0])
    assert known > 3 * read  # only what is new is computed
    leave(chat)


def test_killed_in_an_answer_and_resumed(person, models):
    chat = person.chat(models / "chat.gguf", *ENDLESS)
    chat.wait("^>")
    chat.type("/set max_tokens 4\rhello\r")
    chat.wait("limit of 4 tokens")
    chat.type("/set max_tokens 190000\rgo on for ever\r")
    chat.wait("Ctrl-C stops", after="for ever")
    os.kill(chat.child.pid, signal.SIGKILL)
    chat.end()
    (path,) = person.files()
    with open(path, "a") as file:
        file.write('{"role": "assist')  # as a line that the disk had no room for
    chat = person.chat(models / "chat.gguf", "--resume", "-t", "1", "-n", "4")
    chat.wait("continuing: hello")
    chat.wait("not answered; /regen asks it again")
    chat.type("/regen\r")
    chat.wait("limit of 4 tokens", after="/regen")
    leave(chat)
    (again,) = person.files()
    assert again == path
    chat = person.chat("--resume", "-t", "1")  # with the model that it was
    chat.wait("^chat.gguf, ")
    chat.type("/undo\r")
    chat.wait("taken back: go on for ever")
    leave(chat)


def test_tee_gets_the_answers_alone(person, tmp_path):
    log = tmp_path / "log"
    chat = person.run(["/bin/sh", "-c", f"{MOBILELLM} chat -t 1 | tee {log}"])
    chat.wait("^>")
    chat.type("Who is the baker?\r")
    chat.wait("Marta Bell.*\n>$")
    chat.type("Where does she live?\r")
    chat.wait("Mill Lane.*\n>$")
    chat.type("/set\r")
    chat.wait("thinking.*\n>$")
    leave(chat)
    assert log.read_bytes() == (
        b"Marta Bell is our baker. She makes all the bread and the buns.\n"
        b"Marta lives above the bakery on Mill Lane.\n"
    )


def test_a_base_model_continues_texts(person, models):
    chat = person.chat(models / "base.gguf", "-t", "1", "-n", "6", "--seed", "3")
    chat.wait("a base model without a chat template")
    chat.type("once upon\r")
    chat.wait("limit of 6 tokens")
    chat.type("\r")
    chat.wait("limit of 6 tokens.*\n(.*\n)*.*limit of 6 tokens")
    chat.type("/system be kind\r")
    chat.wait("base model: it knows no instructions")
    leave(chat)
    first, keep, second = person.lines()[2], person.lines()[3], person.lines()[5]
    assert keep == {"keep": 0} and second["content"].startswith(first["content"])
    assert len(second["content"]) > len(first["content"])


def test_thoughts_are_dim_or_hidden(person, models):
    grammar = 'root ::= "<think>let me see</think>" "It is **so**."'
    chat = person.chat(models / "chat.gguf", "-t", "1", "--grammar", grammar)
    chat.wait("^>")
    chat.type("is it?\r")
    text = chat.wait("It is so", after="is it?")
    assert "let me see" in text and "think>" not in text and "**" not in text
    row = next(y for y in range(24) if "let me see" in chat.screen.display[y])
    assert chat.screen.buffer[row][0].italics and not chat.screen.buffer[row + 1][0].italics
    chat.type("/set thinking hide\r")
    chat.wait("thinking +hide")
    chat.type("really?\r")
    text = chat.wait("It is so", after="really?")
    assert text.count("let me see") == 1
    leave(chat)
    answers = [line for line in person.lines() if line.get("role") == "assistant"]
    assert [(line["thinking"], line["content"]) for line in answers] == [
        ("let me see", "It is **so**.")
    ] * 2
