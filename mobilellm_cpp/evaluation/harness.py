"""The model class `mobilellm` of the lm-evaluation-harness; importing this module registers it."""

from __future__ import annotations

from typing import Any

import lm_eval.models  # noqa: F401  registers its own, which it does only while none is known
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from ..cache import resolve
from ..engine.model import MobileLLM
from .likelihood import Scorer


@register_model("mobilellm")
class MobileLLMModel(TemplateLM):  # type: ignore[misc]
    """A GGUF file, checkpoint folder or hub id: `path`, with `n_ctx` and `n_threads` of MobileLLM.
    `type` is that of a checkpoint that is converted for this."""

    def __init__(
        self,
        path: str,
        type: str | None = None,
        n_ctx: int = 0,
        n_threads: int = 0,
        **_: Any,  # batch_size, device, ... of the command line
    ) -> None:
        super().__init__()
        file = resolve(path, type)  # type: ignore[arg-type]
        self.llm = MobileLLM(file, n_ctx=int(n_ctx), n_threads=int(n_threads))
        self.scorer = Scorer(self.llm)

    @property
    def eot_token_id(self) -> int:
        return int(self.llm.token_eos())

    @property
    def prefix_token_id(self) -> int:
        bos = int(self.llm.token_bos())
        return bos if bos >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.model_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self.llm.tokenize(
            string.encode(), add_bos=add_special_tokens is not False, special=True
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            return self.scorer.score(
                [(context, continuation) for _, context, continuation in requests],
                lambda done: bar.update(done - bar.n),
            )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context where they are longer."""
        found = []
        for request in requests:
            tokens = [self.prefix_token_id, *self.tok_encode(request.args[0], False)]
            window = self.llm.n_ctx()
            pairs = [
                (tokens[at : at + 1], tokens[at + 1 : at + window])
                for at in range(0, len(tokens) - 1, window - 1)
            ]
            found.append(sum(score for score, _ in self.scorer.score(pairs)))
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to one of the stops that a task names."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate_until"):
            prompt, options = request.args
            until = options.get("until") or []
            stop = [until] if isinstance(until, str) else list(until)
            tokens = self.tok_encode(prompt)
            length = int(options.get("max_gen_toks", 256))
            room = max(1, self.llm.n_ctx() - length)
            text = "".join(
                self.llm.stream(
                    tokens[-room:],
                    max_tokens=length,
                    temperature=float(options.get("temperature", 0.0)),
                    stop=stop,
                )
            )
            found.append(text)
        return found
