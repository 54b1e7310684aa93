"""mobilellm generate: continue a text, or answer it once; made for scripts."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..texts import read_text
from .common import (
    Adapters,
    Cache,
    Context,
    Mlock,
    OptionalModel,
    Threads,
    Type,
    parse_adapters,
    print_json,
)
from .sampling import takes_sampling

if TYPE_CHECKING:
    from ..engine.answers import Answer
    from ..engine.model import MobileLLM


@takes_sampling
def generate(
    *,
    model: OptionalModel = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The text to continue.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("-f", "--file", help="The file with the text; - or no option: stdin."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "-s",
            "--system",
            help="Instructions: answer the text as a chat message that follows them.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", "--tokens", min=1, help="The most tokens to make.")] = 128,
    answers: Annotated[
        int, typer.Option("--n", min=1, max=1 << 20, help="How many texts to make, together.")
    ] = 1,
    sampling: dict[str, Any],
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1 << 20,
            help="With --json: log probabilities, each with so many of the likeliest tokens.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object in the format of OpenAI's API.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--prompt-cache",
            help="Keep what is computed of the text on disk, for texts that begin alike.",
        ),
    ] = False,
    lora: Adapters = None,
    type: Type = None,
    ctx: Context = 0,
    cache_type: Cache = None,
    threads: Threads = 0,
    mlock: Mlock = False,
) -> None:
    """Continue a text.

    The text comes from -p, a file or stdin. Only the continuation goes to stdout. The same seed
    gives the same continuation with any number of threads.
    """
    if logprobs is not None and not as_json:
        raise typer.BadParameter("log probabilities need --json", param_hint="--logprobs")
    text = _prompt(prompt, file)
    from .common import load

    options = {"n_ctx": ctx, "n_threads": threads, "cache_type": cache_type, "use_mlock": mlock}
    llm = load(model, type, lora=parse_adapters(lora), **options)
    if keep:
        llm.use_prompt_cache()
    asked: Any = text
    if system is not None:
        asked = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    sampling = {"max_tokens": n, "logprobs": logprobs, **sampling}
    first = sampling.pop("seed", None)
    first = int.from_bytes(os.urandom(4), "little") >> 1 if first is None else first
    seeds = [(first + i) % (1 << 32) for i in range(answers)]
    start = time.perf_counter()
    if answers == 1 and not as_json:
        total = _write(llm.stream(asked, seed=first, **sampling))
    else:
        made = llm.batch([asked] * answers, seeds=seeds, **sampling)
        total = sum(answer.usage["total_tokens"] for answer in made)
        if as_json:
            print_json(_as_openai(llm, model, made, seeds, chat=system is not None))
        else:
            for answer in made:
                print(answer)
    seconds = time.perf_counter() - start
    say = f"{total} tokens, prompt included, in {seconds:.2f} s; seed {first}"
    print(say, file=sys.stderr)


def _prompt(prompt: str | None, file: str | None) -> str:
    """The text; the line end at the end of a file is the file's, not the text's."""
    if prompt is not None and file is not None:
        raise typer.BadParameter("give the text with -p or with -f, not with both")
    if prompt is not None:
        return prompt
    if file in (None, "-"):
        if sys.stdin.isatty():
            if file is None:
                raise typer.BadParameter("give the text to continue with -p, -f or on stdin")
            print("(end the text with Ctrl-D)", file=sys.stderr)
        text = sys.stdin.read()
    else:
        text = read_text(str(file))
    return text.removesuffix("\n").removesuffix("\r")


def _write(stream: Any) -> int:
    """Writes a text as it is made; how many tokens there were."""
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    total: int = stream.usage["total_tokens"]
    return total


def _as_openai(
    llm: "MobileLLM",
    name: str | None,
    made: "Sequence[Answer]",
    seeds: Sequence[int],
    chat: bool,
) -> dict[str, Any]:
    """The object of a completion, or of a chat completion, with the seed of each choice."""
    usages = [answer.usage for answer in made]
    prompt = usages[0]["prompt_tokens"]
    completion = sum(usage["completion_tokens"] for usage in usages)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{seeds[0]:08x}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": Path(name).stem if name else "mobilellm-demo",
        "choices": [
            {
                "index": index,
                **(
                    {"message": {"role": "assistant", "content": answer}}
                    if chat
                    else {"text": answer}
                ),
                "logprobs": _logprobs(llm, answer, chat),
                "finish_reason": answer.finish_reason,
                "seed": seed,
            }
            for index, (answer, seed) in enumerate(zip(made, seeds, strict=True))
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }


def _logprobs(llm: "MobileLLM", answer: "Answer", chat: bool) -> dict[str, Any] | None:
    if answer.logprobs is None:
        return None

    def text_of(token: int) -> str:
        return llm.detokenize([token], special=True).decode("utf-8", "replace")

    if chat:
        return {
            "content": [
                {
                    "token": each.text.decode("utf-8", "replace"),
                    "bytes": list(each.text),
                    "logprob": each.logprob,
                    "top_logprobs": [
                        {"token": text_of(token), "bytes": None, "logprob": logprob}
                        for token, logprob in each.best
                    ],
                }
                for each in answer.logprobs
            ]
        }
    tokens = [each.text.decode("utf-8", "replace") for each in answer.logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [each.logprob for each in answer.logprobs],
        "top_logprobs": [
            {text_of(token): logprob for token, logprob in each.best} for each in answer.logprobs
        ],
        "text_offset": [sum(map(len, tokens[:i])) for i in range(len(tokens))],
    }
