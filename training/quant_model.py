"""Train a layer-shared model of real widths on documentation, to measure quantization on.

    python training/quant_model.py TEXT... --out FOLDER [--minutes M] [--threads N]
    python training/quant_model.py TEXT... --out FOLDER --device cuda --minutes 0.9 --rows 256

Promises: the widths of MobileLLM-125M (576, 9 heads, 3 KV heads, FFN 1536) with three stored blocks
and a vocabulary of 3,072, so that the embedding is 14 % of the weights; it trains for M minutes of
the clock, the learning rate falling with it, and writes FOLDER in the hub's layout every few
minutes and at the end. Another call goes on from there (training.pt) until M minutes are spent in
all. It is no good model, but rounding costs it what it costs a good one: its activations are real.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

import sentencepiece as spm
import torch
import torch.nn.functional as F
from model import Model, Shape, save
from train import optimizers, train_tokenizer

SHAPE = Shape(vocab=3072, hidden=576, ffn=1536, blocks=3, heads=9, kv_heads=3, context=2048)
LENGTH = 256  # tokens of a row
PIECE = 8192  # characters encoded at a time: SentencePiece takes long texts apart slowly
SAVE_EVERY = 240.0  # seconds


def factor(share: float) -> float:
    """The learning rate's factor after this share of the time: a short rise, then a line down."""
    return min(1.0, share / 0.02) * max(0.02, 1 - share)


def restore(state: Path, model: Model, tools: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Put what an earlier call kept into model and tools; return its steps and seconds."""
    kept = torch.load(state, map_location="cpu", weights_only=True)
    model.load_state_dict(kept["model"])
    for tool, its in zip(tools, kept["tools"], strict=True):
        tool.load_state_dict(its)
    return kept["step"], kept["spent"]


def train(options: argparse.Namespace, tokenizer: Path) -> None:
    text = "\n".join(path.read_text() for path in options.texts)
    torch.manual_seed(1)
    model = Model(SHAPE).to(options.device)
    tools = optimizers(model, options.lr, 0.1)
    state = options.out / "training.pt"
    step, spent = 0, 0.0
    if state.exists():
        tokenizer = options.out / "tokenizer.model"
        sp = spm.SentencePieceProcessor(model_file=str(tokenizer))
        step, spent = restore(state, model, tools)
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        sp = train_tokenizer(lines[:: max(1, len(lines) // 100_000)], SHAPE.vocab, tokenizer)
    torch.manual_seed(1 + step)
    pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
    encoded = sp.encode(pieces, num_threads=os.cpu_count())
    tokens = torch.tensor(list(itertools.chain(*encoded)), device=options.device)
    print(f"{len(tokens)} tokens, {sum(p.numel() for p in model.parameters())} weights", flush=True)

    def keep() -> None:
        save(model, tokenizer, options.out)
        parts = {"model": model.state_dict(), "tools": [tool.state_dict() for tool in tools]}
        part = state.with_suffix(".part")
        torch.save({**parts, "step": step, "spent": time.time() - start}, part)
        part.replace(state)

    saved = time.time()
    start = saved - spent
    while (share := (time.time() - start) / 60 / options.minutes) < 1:
        for tool in tools:
            for group in tool.param_groups:
                group["lr"] = options.lr * factor(share)
        at = torch.randint(len(tokens) - LENGTH, (options.rows, 1), device=options.device)
        rows = tokens[at + torch.arange(LENGTH + 1, device=options.device)]
        rows[:, 0] = 1  # each row begins as a text does
        with torch.autocast(options.device, torch.bfloat16):
            logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in tools:
            tool.step()
            tool.zero_grad()
        step += 1
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
        if time.time() - saved > SAVE_EVERY:
            keep()
            saved = time.time()
    keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=8, help=f"of {LENGTH} tokens, in a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        train(options, Path(folder) / "tokenizer.model")


if __name__ == "__main__":
    main()
