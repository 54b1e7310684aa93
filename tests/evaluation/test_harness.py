"""lm_eval's tasks on model files: log-likelihoods as the PyTorch reference gives them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch
from mobilellm_cpp.convert import convert_checkpoint
from mobilellm_cpp.convert.checkpoint import open_checkpoint
from mobilellm_cpp.convert.reference import Reference

from mobilellm_cpp import MobileLLM, ModelError
from mobilellm_cpp.engine.library import decode
from mobilellm_cpp.evaluation import likelihood
from mobilellm_cpp.evaluation.likelihood import Scorer

DEMO = Path(sys.modules["mobilellm_cpp"].__file__).parent / "demo"
HELDOUT = Path(__file__).parents[2] / "training" / "heldout.jsonl"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness") / "demo.gguf"
    convert_checkpoint(DEMO, path, type="f32")
    return path


def questions() -> list[str]:
    found = [json.loads(line)["messages"][0]["content"] for line in HELDOUT.open()]
    return [f"User: {question}\nAssistant:" for question in found[:12]]


ANSWERS = [" I am Pip.", " The baker.", " Yes.", " In the old mill by the river."]


def test_against_pytorch(file: Path) -> None:
    reference = Reference(open_checkpoint(DEMO))
    f32 = llama_cpp.GGML_TYPE_F32  # a cache in f16 moves a sum of -31 by 0.0016
    with MobileLLM(file, n_threads=1, type_k=f32, type_v=f32) as llm:
        scorer = Scorer(llm)
        pairs = []
        for question in questions():
            context = llm.tokenize(question.encode())
            for answer in ANSWERS:
                pairs.append((context, llm.tokenize((question + answer).encode())[len(context) :]))
        found = scorer.score(pairs)
        alone = [scorer.score([pair])[0] for pair in pairs[:5]]
        scorer.close()
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        tokens = [*context, *continuation]
        logits = torch.as_tensor(reference.logits(tokens)).double()
        rows = logits.log_softmax(-1)[len(context) - 1 : -1]
        wanted = float(rows[range(len(continuation)), continuation].sum())
        assert score == pytest.approx(wanted, abs=1e-3)
        assert greedy == (rows.argmax(-1).tolist() == list(continuation))
    assert alone == [(pytest.approx(score, abs=1e-4), g) for score, g in found[:5]]


def test_what_is_in_common_is_computed_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples before every question, in several batches; scores are those of each pair alone."""
    computed: list[int] = []

    def counted(context: object, batch: Any) -> None:
        computed.append(batch.n_tokens)
        decode(context, batch)

    monkeypatch.setattr(likelihood, "decode", counted)
    with MobileLLM(file, n_threads=1, type_k=0, type_v=0, n_batch=64) as llm:
        scorer = Scorer(llm)
        examples = llm.tokenize("".join(f"{q} Yes.\n" for q in questions()[6:]).encode())
        pairs = []
        for question in questions()[:6]:
            rest = llm.tokenize(question.encode(), add_bos=False)
            for answer in [*ANSWERS, " Yes. It is.", ANSWERS[0]]:  # some of them begin alike
                answers = llm.tokenize(answer.encode(), add_bos=False)
                pairs.append(([*examples, *rest], answers))
        found = scorer.score(pairs)
        together = sum(computed)
        computed.clear()
        alone = [scorer.score([pair])[0] for pair in pairs]
        scorer.close()
    assert len(pairs) > scorer.sequences
    assert found == [(pytest.approx(score, abs=1e-3), greedy) for score, greedy in alone]
    beginnings = {tuple([*c, *a][:n]) for c, a in pairs for n in range(1, len(c) + len(a))}
    assert len(beginnings) <= together <= 1.2 * len(beginnings)
    assert sum(computed) > 10 * together


def test_long_and_refused(file: Path) -> None:
    """A context that does not fit loses its beginning; what is empty is refused."""
    with MobileLLM(file, n_ctx=256, n_threads=1) as llm:
        scorer = Scorer(llm)
        tokens = list(range(10, 600))
        (long,) = scorer.score([(tokens, [5, 6])])
        (cut,) = scorer.score([(tokens[-255:], [5, 6])])
        assert long == (pytest.approx(cut[0], abs=1e-5), cut[1])
        with pytest.raises(ModelError, match="at least one token"):
            scorer.score([([], [1])])
        scorer.close()


def write_task(tmp_path: Path) -> None:
    """A task of our own, in files."""
    lines = [{"question": question, "choices": ANSWERS, "label": 0} for question in questions()[:4]]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "village.yaml").write_text(
        f"""task: village
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )


def test_lm_eval(file: Path, tmp_path: Path) -> None:
    """The command line of lm_eval over a task of our own."""
    pytest.importorskip("lm_eval")
    write_task(tmp_path)
    command = [sys.executable, "-m", "mobilellm_cpp.evaluation", "--model", "mobilellm"]
    command += ["--model_args", f"path={file},n_threads=1", "--tasks", "village"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (out,) = (tmp_path / "out").rglob("results*.json")
    assert 0 <= json.loads(out.read_text())["results"]["village"]["acc,none"] <= 1


def test_beside_hugging_face(file: Path, tmp_path: Path) -> None:
    """Our file, and an encoder-decoder model that transformers runs."""
    pytest.importorskip("lm_eval")
    from mobilellm_cpp.evaluation.tasks import run_tasks

    write_task(tmp_path)
    make_t5(tmp_path / "t5")
    models = [str(file), f"hf:{tmp_path}/t5"]
    found = run_tasks(models, ["village"], include=tmp_path, n_threads=1)
    assert [result.model for result in found] == models
    assert all(0 <= result.value <= 1 and result.metric == "acc" for result in found)
    with pytest.raises(ModelError, match="no task hills"):
        run_tasks(models[:1], ["hills"], include=tmp_path)


def make_t5(folder: Path) -> None:
    """A random flan-T5 with a vocabulary of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = sorted({word for text in [*questions(), *ANSWERS] for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
