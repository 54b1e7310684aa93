"""R1 and Pro: logits against transformers' Llama 4, f32 file and f32 KV cache.

Pro's truth is the same Llama 4 with transformers' own sliding-window mask in the place of its
chunked one: the published class is remote code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from batches import decode
from checkpoints import executed, make_pro, make_r1
from safetensors.torch import load_file
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.llama4 import modeling_llama4

from mobilellm_cpp import MobileLLM, convert_checkpoint

GGML_F32 = 0
BOUND = 2e-4  # of the largest logit
WINDOW = 16

R1 = {
    "r1": ({}, None),
    "no-rope": ({"rope": [1, 0, 1]}, None),
    "no-rope-at-all": ({"rope": [0, 0, 0]}, None),
    "no-qk-norm": ({"rope": [1, 1, 0], "qk_norm": False}, None),
    "shared": ({"rope": [1, 0, 1]}, [0, 0, 1, 1, 2, 2]),
}
PRO = {
    "pro": ({"sliding": [0, 1, 1], "rope": [1, 1, 0]}, None),
    "sliding-only": ({"sliding": [1, 1, 1]}, None),
    "no-qk-norm": ({"sliding": [1, 0, 0], "qk_norm": False}, None),
    "reverse": ({"sliding": [0, 1, 0]}, [0, 1, 2, 2, 1, 0]),
}


def truth(folder: Path, schedule: list[int] | None) -> transformers.Llama4ForCausalLM:
    """The checkpoint as a Llama 4 that holds every executed layer."""
    fields = json.loads((folder / "config.json").read_text())
    order = schedule or list(range(fields["num_hidden_layers"]))
    for name in ("layer_types", "no_rope_layers"):
        fields[name] = [fields[name][block] for block in order]
    kinds = {"sliding_attention": "chunked_attention"}
    fields["layer_types"] = [kinds.get(kind, kind) for kind in fields["layer_types"]]
    fields["num_hidden_layers"] = len(order)
    for name in ("architectures", "model_type", "rope_scaling"):
        del fields[name]
    config = transformers.Llama4TextConfig(**fields, attn_implementation="eager")
    model = transformers.Llama4ForCausalLM(config)
    weights = executed(load_file(folder / "model.safetensors"), order)
    missing, extra = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not extra  # tied
    return model.eval()


@pytest.fixture(scope="module", params=[*R1.items(), *PRO.items()], ids=lambda case: case[0])
def pair(request, tmp_path_factory):
    """(path of the GGUF file, truth as a function of tokens) for one checkpoint."""
    _, (options, schedule) = request.param
    folder = tmp_path_factory.mktemp("family")
    if "sliding" in options:
        checkpoint = make_pro(folder / "c", window=WINDOW, dtype="f32", **options)
    else:
        checkpoint = make_r1(folder / "c", dtype="f32", **options)
    report = convert_checkpoint(checkpoint, folder / "m.gguf", type="f32", schedule=schedule)
    assert report.architecture == "mobilellm"
    model = truth(checkpoint, schedule)

    def expected(tokens: list[int]) -> np.ndarray:
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            if "sliding" in options:
                sliding = create_sliding_window_causal_mask
                patch.setattr(modeling_llama4, "create_chunked_causal_mask", sliding)
            return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()

    return folder / "m.gguf", expected


def load(path: Path, **arguments) -> MobileLLM:
    arguments = {"type_k": GGML_F32, "type_v": GGML_F32, "n_ctx": 512, "n_threads": 1, **arguments}
    return MobileLLM(path, **arguments)


def tokens_of(seed: int, n: int = 90) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, n).tolist()


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= BOUND * np.abs(want).max()


def test_whole_prompt(pair):
    path, expected = pair
    tokens = tokens_of(1)
    assert_close(load(path).logits(tokens), expected(tokens))


def test_prompt_longer_than_a_batch(pair):
    path, expected = pair
    tokens = tokens_of(2)
    assert_close(load(path, n_batch=16, n_ubatch=16).logits(tokens), expected(tokens))


def test_token_by_token(pair):
    path, expected = pair
    tokens = tokens_of(3)
    llm = load(path)
    got = np.concatenate([decode(llm, [(t, i, 0)]) for i, t in enumerate(tokens)])
    assert_close(got, expected(tokens))


def test_beyond_the_cache_of_the_sliding_layers(pair):
    """Their cache has 256 cells here, and what fell out of the window is overwritten."""
    path, expected = pair
    tokens = tokens_of(8, 340)
    want = expected(tokens)
    llm = load(path, n_ctx=1024, n_batch=16, n_ubatch=16)
    assert_close(llm.logits(tokens), want)
    llm.reset()
    llm.eval(tokens[:320])
    got = []
    for token in tokens[320:]:
        llm.eval([token])
        got.append(llm._last_logits)
    assert_close(np.stack(got), want[320:])


# Sliding windows


@pytest.fixture(scope="module")
def pro(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pro")
    checkpoint = make_pro(
        folder / "c", sliding=[0, 1, 1], window=WINDOW, max_position_embeddings=4096
    )
    convert_checkpoint(checkpoint, folder / "m.gguf")
    return folder / "m.gguf"


def small(path: Path, **arguments) -> MobileLLM:
    """The sliding layers' cache has 256 cells, of which a batch takes 16."""
    return load(path, n_ctx=1024, n_batch=16, n_ubatch=16, **arguments)


def greedy(llm: MobileLLM, tokens: list[int], n: int = 8) -> list[int]:
    stream = llm.generate(tokens, temp=0)
    return [next(stream) for _ in range(n)]


@pytest.mark.parametrize("kept", [20, 200, 590])
def test_a_reused_prefix_gives_what_a_fresh_context_gives(pro, kept):
    """After 600 tokens the sliding cache has dropped what a short prefix needs."""
    first = tokens_of(4, 600)
    second = first[:kept] + tokens_of(5, 30)
    llm = small(pro)
    greedy(llm, first)
    got = greedy(llm, second)
    assert got == greedy(small(pro), second) == greedy(small(pro, swa_full=True), second)


def test_a_prefix_is_reused_only_while_its_window_is_there(pro):
    llm = small(pro)
    llm.eval(tokens_of(4, 600))
    assert not llm._sequences.places.can_cut(llm._own.state, 20)
    assert llm._sequences.places.can_cut(llm._own.state, 590)


def test_state_is_saved_and_restored(pro):
    tokens = tokens_of(6, 400)
    llm = small(pro)
    llm.eval(tokens[:350])
    state = llm.save_state()
    other = small(pro)
    other.load_state(state)
    rest = [np.concatenate([decode(m, [(t, 350 + i, 0)]) for i, t in enumerate(tokens[350:])])
            for m in (llm, other)]  # fmt: skip
    np.testing.assert_array_equal(*rest)


def test_a_shifted_context_turns_the_keys_of_all_layers(pro):
    """The K cache of sliding layers is rotated by the model's own base. Keys keep what they were
    computed from, so the outcome is that of unshifted keys at the old places: RoPE is relative."""
    import llama_cpp

    tokens = tokens_of(7, 40)
    rows = []
    for by in (0, -8):
        llm = small(pro)
        for i, t in enumerate(tokens):
            decode(llm, [(t, 8 + i, 0)])
        llama_cpp.llama_memory_seq_add(llama_cpp.llama_get_memory(llm.ctx), 0, 0, -1, by)
        rows.append(decode(llm, [(5, 48 + by, 0)]))
    assert_close(rows[1], rows[0])


PUBLISHED_LAYERS = [i % 4 != 0 and i != 29 for i in range(30)]  # 1: sliding

KV_SIZE = """
import re, sys
from mobilellm_cpp import MobileLLM
def mapped():  # a cache's pages are not in memory until they are used
    return int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1])
llms = [MobileLLM(sys.argv[1], n_ctx=256, n_threads=1, n_ubatch=512)]
before = mapped()
llms.append(MobileLLM(sys.argv[1], n_ctx=32768, n_threads=1, n_batch=512, n_ubatch=512,
    swa_full=bool(int(sys.argv[2]))))
print(mapped() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kv_cache_of_pro_is_about_a_third_of_a_full_one(tmp_path):
    shape = {"hidden": 256, "heads": 4, "kv_heads": 2, "layers": 30}  # K and V: 512 B a token
    checkpoint = make_pro(
        tmp_path / "c",
        sliding=[int(x) for x in PUBLISHED_LAYERS],
        window=512,
        max_position_embeddings=131072,
        **shape,
    )
    convert_checkpoint(checkpoint, tmp_path / "m.gguf")

    def grown(full: int) -> int:
        command = [sys.executable, "-c", KV_SIZE, str(tmp_path / "m.gguf"), str(full)]
        plain = {**os.environ, "MOBILELLM_KERNELS": "0"}  # whose step reserves less
        done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
        return int(done.stdout)

    sliding, full = grown(0), grown(1)
    expected = 30 * 32768 * 2 * 2 * 2 * 64 / 1024
    assert expected < full < 1.5 * expected
    # 9 of 30 layers are full; the others hold five windows and a batch, of which one sequence uses
    # one window. What is no cache costs both the same.
    assert sliding <= 0.37 * expected + (full - expected)
