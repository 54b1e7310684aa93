"""ExecuTorch: 8da4w over XNNPACK, as its own exporter for Llama makes it: int4 in groups of 32 with
int8 activations, the head too; the embedding in 8 bits. Its Python runtime needs torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

NAMES = {  # of a Llama as Meta stores it
    "model.layers": "layers",
    "model.norm": "norm",
    "model.embed_tokens": "tok_embeddings",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def convert(checkpoint: Path, out: Path) -> None:
    import torch
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    weights = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = weight.float()
    weights["output.weight"] = weights["tok_embeddings.weight"]
    sizes = {
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "use_hf_rope": True,
    }
    out.mkdir(exist_ok=True)
    torch.save(weights, out / "weights.pth")
    (out / "params.json").write_text(json.dumps(sizes))
    options = {
        "base.model_class": "llama3",
        "base.checkpoint": out / "weights.pth",
        "base.params": out / "params.json",
        "model.use_kv_cache": True,
        "model.use_sdpa_with_kv_cache": True,
        "model.dtype_override": "fp32",
        "quantization.qmode": "8da4w",
        "quantization.group_size": 32,
        "quantization.embedding_quantize": "'8,32'",
        "backend.xnnpack.enabled": True,
        "backend.xnnpack.extended_ops": True,
        "export.max_seq_length": 512,
        "export.max_context_length": 512,
        "export.output_name": out / "model.pte",
    }
    exporter = [sys.executable, "-m", "executorch.examples.models.llama.export_llama", "--hydra"]
    settings = [f"{key}={value}" for key, value in options.items()]
    subprocess.run([*exporter, *settings], check=True, cwd=out)  # which leaves its log there
    (out / "weights.pth").unlink()


class Session:
    def __init__(self, path: Path, threads: int) -> None:
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
        import torch
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(threads)
        self._torch: Any = torch
        self._model = portable_lib._load_for_executorch(str(path / "model.pte"))
        self._n = 0

    def prefill(self, tokens: list[int]) -> None:
        self._n = 0
        self._run(tokens)

    def step(self, token: int) -> None:
        self._run([token])

    def _run(self, tokens: list[int]) -> None:
        place = self._torch.tensor([self._n])
        self._model.forward((self._torch.tensor([tokens]), place))
        self._n += len(tokens)
