"""A Llama checkpoint of random weights at a shape of MobileLLM, as transformers stores it, with a
byte-level BPE of made-up words (MNN knows none of whole words): python checkpoint.py 125M FOLDER"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import PUBLISHED

    shape, folder = sys.argv[1], Path(sys.argv[2])
    sizes = PUBLISHED[shape]
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["ffn"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="float16",
    )
    torch.manual_seed(1)
    unfinished = folder.with_suffix(".part")
    LlamaForCausalLM(config).half().save_pretrained(unfinished)
    write_tokenizer(unfinished, sizes["vocab"])
    unfinished.rename(folder)


def write_tokenizer(folder: Path, size: int) -> None:
    from tokenizers import pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"w{i}" for i in range(len(pieces), size)]
    words = {piece: i for i, piece in enumerate(pieces)}
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
    added = [{"id": i, "content": t, "normalized": False, **special} for t, i in words.items()][:3]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = True
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": words, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


if __name__ == "__main__":
    main()
