"""The demo model in PyTorch: a layer-shared MobileLLM, and its folder on disk.

Promises: `Model.forward` is the Llama block (RMSNorm, rotary embedding with split halves, grouped
queries, SwiGLU) with every stored block executed twice in a row; the head is the embedding.
`save` writes a folder in the hub's layout (config.json, model.safetensors, tokenizer files), and
`load` reads one back. Nothing here knows about the text or about training.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BOS, EOS = 1, 2
EXECUTIONS = 2  # of every stored block, one directly after the other

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n"
    "{% elif m['role'] == 'user' %}User: {{ m['content'] }}\nAssistant:"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; row lengths are multiples of 64 so that every block type fits."""

    vocab: int = 2048
    hidden: int = 256
    ffn: int = 512
    blocks: int = 3
    heads: int = 4
    kv_heads: int = 2
    context: int = 1024
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def to_config(self) -> dict[str, object]:
        """Return the content of config.json, with the hub's keys."""
        return {
            "architectures": ["MobileLLMForCausalLM"],
            "model_type": "mobilellm",
            "layer_sharing": True,
            "share_embedding": True,
            "tie_word_embeddings": False,
            "use_cache": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "rope_scaling": None,
            "initializer_range": 0.02,
            "vocab_size": self.vocab,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "torch_dtype": "bfloat16",
        }

    @staticmethod
    def from_config(config: dict[str, Any]) -> Shape:
        """Return the shape that a config.json written by `to_config` describes."""
        return Shape(
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            blocks=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            context=config["max_position_embeddings"],
            theta=config["rope_theta"],
            eps=config["rms_norm_eps"],
        )


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps)


def rotary(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (length, head_dim), for positions 0 to length - 1."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float64), shape.theta**-half)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x: (batch, heads, length, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal attention with grouped queries; names as on the hub."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        kv = shape.kv_heads * shape.head_dim
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        split = (batch, length, -1, self.shape.head_dim)
        q = rotate(self.q_proj(x).view(split).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(split).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(split).transpose(1, 2)
        groups = self.shape.heads // self.shape.kv_heads
        k = k.to(v.dtype).repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(
            q.to(v.dtype), k, v, attn_mask=mask, is_causal=mask is None
        )
        joined: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return joined


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One stored block; `dropout` acts on what it adds to the stream."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.mlp = FeedForward(shape)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.drop(self.self_attn(self.input_layernorm(x), cos, sin, mask))
        out: Tensor = x + self.drop(self.mlp(self.post_attention_layernorm(x)))
        return out


class Trunk(nn.Module):
    """Embedding, blocks and final norm: the hub's `model.` prefix."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape, dropout) for _ in range(shape.blocks))
        self.norm = RMSNorm(shape.hidden, shape.eps)


class Model(nn.Module):
    """tokens (batch, length) -> logits (batch, length, vocab)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape, dropout)
        cos, sin = rotary(shape, shape.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def hidden(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the normed stream; mask (batch, 1, length, length) is true where one may look."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x: Tensor = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            for _ in range(EXECUTIONS):
                x = block(x, cos, sin, mask)
        x = self.model.norm(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.logits(self.hidden(tokens, mask))


def encode_chat(sp: spm.SentencePieceProcessor, messages: list[dict[str, str]]) -> list[int]:
    """Return the tokens of messages (system, user, assistant) as the chat template lays them out.

    Text between special tokens is encoded piece by piece, each with its own space in front: this
    is what llama.cpp makes of the template's text.
    """
    tokens, text = [BOS], ""
    for message in messages:
        if message["role"] == "assistant":
            tokens += [*sp.encode(f"{text} {message['content']}"), EOS]
            text = ""
        elif message["role"] == "user":
            text += f"User: {message['content']}\nAssistant:"
        else:
            text += f"{message['content']}\n"
    return tokens + sp.encode(text) if text else tokens


@torch.no_grad()
def reply(
    model: Model,
    sp: spm.SentencePieceProcessor,
    messages: list[dict[str, str]],
    max_tokens: int = 80,
) -> str:
    """Return the model's greedy answer to the last message."""
    tokens = encode_chat(sp, messages)
    start = len(tokens)
    for _ in range(max_tokens):
        window = torch.tensor([tokens], device=model.cos.device)
        following = int(model.logits(model.hidden(window)[:, -1:]).argmax())
        if following == EOS:
            break
        tokens.append(following)
    text: str = sp.decode(tokens[start:])
    return text.strip()


def save(model: Model, tokenizer: Path, folder: Path) -> None:
    """Write the checkpoint folder: weights in BF16, `tokenizer` copied to tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    if tokenizer.resolve() != (folder / "tokenizer.model").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    files: dict[str, dict[str, object]] = {
        "config.json": model.shape.to_config(),
        "generation_config.json": {
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "do_sample": False,
        },
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": model.shape.context,
            "tokenizer_class": "LlamaTokenizer",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def load(folder: Path) -> tuple[Model, spm.SentencePieceProcessor]:
    """Return the model (float32, evaluation mode) and the tokenizer of a checkpoint folder."""
    model = Model(Shape.from_config(json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    sp = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return model.eval(), sp
