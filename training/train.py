"""Train the demo model from nothing and write its checkpoint folder.

    python training/train.py [--out FOLDER] [--steps N] [--seed S] [--device cpu|cuda] ...

Promises: everything is drawn from the seed: the text (`dialogues`), the tokenizer, the weights.
The same seed, device, number of threads and library versions give the same folder. It reads only
the world in `intents/` and, to report progress, `dev.jsonl`; the held-out questions are never
opened. The folder is written at the end (and every --save-every steps, when given), in the hub's
layout and below 8 MB.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import sentencepiece as spm
import torch
import torch.nn.functional as F
from dialogues import Encoder, Speaker, tokenizer_lines
from model import Model, Shape, encode_chat, save
from torch import Tensor
from world import Intent, Item, read_items, read_world

HERE = Path(__file__).parent
DEMO = HERE.parent / "mobilellm_cpp" / "demo"
LIMIT = 8_000_000  # bytes of the whole folder


def train_tokenizer(lines: Iterable[str], vocab: int, path: Path) -> spm.SentencePieceProcessor:
    """Train a SentencePiece BPE vocabulary on lines, write it to path and return it."""
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        required_chars="".join(map(chr, range(33, 127))),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_file=str(path))


def batch(
    encoder: Encoder, rows: int, length: int, longest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs, targets, weights (rows, length) and the mask that keeps dialogues apart."""
    drawn = [encoder.row(length + 1, longest) for _ in range(rows)]
    tokens = torch.tensor([row[0] for row in drawn])
    weights = torch.tensor([row[1] for row in drawn])
    owner = torch.tensor([row[2] for row in drawn])[:, :-1]
    same = owner[:, None, :, None] == owner[:, None, None, :]
    mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    return tokens[:, :-1], tokens[:, 1:], weights[:, 1:], mask


def optimizers(model: Model, lr: float, decay: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for embedding and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    embedding: list[Tensor] = [model.model.embed_tokens.weight]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([*embedding, *vectors], lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate: a linear rise, then half a cosine down to 0.02."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def accuracy(
    model: Model, sp: spm.SentencePieceProcessor, items: list[Item], intents: dict[str, Intent]
) -> int:
    """Return how many items get their intent's answer, exactly, by greedy choice.

    One pass an item: greedy text equals the answer when each of its tokens is the likeliest.
    """
    model.eval()
    right = 0
    for item in items:
        prompt = encode_chat(sp, item.messages)
        answer = {"role": "assistant", "content": intents[item.intent].answer}
        tokens = torch.tensor([encode_chat(sp, [*item.messages, answer])], device=model.cos.device)
        chosen = model(tokens)[0].argmax(-1)
        right += bool((chosen[len(prompt) - 1 : -1] == tokens[0, len(prompt) :]).all())
    model.train()
    return right


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO, help="checkpoint folder to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row; every 10th: context")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--prompt-weight", type=float, default=0.02, help="loss of a prompt token")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--check-every", type=int, default=200, help="steps between dev checks")
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--dev", type=Path, default=HERE / "dev.jsonl")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace, tokenizer: Path) -> None:
    """Train as options say; `tokenizer` is where the tokenizer is put meanwhile."""
    intents = read_world()
    by_name = {intent.name: intent for intent in intents}
    dev = read_items(options.dev)
    lines = tokenizer_lines(Speaker(intents, options.seed), 40000)
    sp = train_tokenizer(lines, options.vocab, tokenizer)
    shape = Shape(
        vocab=options.vocab, hidden=options.hidden, ffn=options.ffn, blocks=options.blocks
    )
    model = Model(shape, options.dropout).to(options.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(intents)} intents, {size} parameters, {options.steps} steps", flush=True)

    encoder = Encoder(sp, Speaker(intents, options.seed + 1), options.prompt_weight)
    tools = optimizers(model, options.lr, options.decay)
    start, running = time.time(), 0.0
    for step in range(options.steps):
        for tool in tools:
            for group in tool.param_groups:
                group["lr"] = options.lr * schedule(step, options.steps, 100)
        length = shape.context if step % 10 == 9 else options.length
        rows = max(1, options.tokens // length)
        drawn = batch(encoder, rows, length, 25 if length == shape.context else 12)
        inputs, targets, weights, mask = (tensor.to(options.device) for tensor in drawn)
        with torch.autocast(options.device, torch.bfloat16):
            logits = model(inputs, mask)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        mean = (loss * weights.flatten()).sum() / weights.sum()
        mean.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in tools:
            tool.step()
            tool.zero_grad()
        running += mean.item()
        if (step + 1) % options.log_every == 0:
            seconds = time.time() - start
            print(f"step {step + 1} loss {running / options.log_every:.4f} {seconds:.0f} s")
            running = 0.0
            sys.stdout.flush()
        if (step + 1) % options.check_every == 0:
            print(f"  dev {accuracy(model, sp, dev, by_name)}/{len(dev)}", flush=True)
        if options.save_every and (step + 1) % options.save_every == 0:
            save(model, tokenizer, options.out)
    save(model, tokenizer, options.out)


def main() -> int:
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        train(options, Path(folder) / "tokenizer.model")
    size = sum(path.stat().st_size for path in options.out.iterdir() if path.is_file())
    print(f"wrote {options.out}: {size} bytes")
    if size > LIMIT:
        print(f"the folder is larger than {LIMIT} bytes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
