"""Architectures that the converter does not write: a wrong file is refused here as well.

Before, a weight of type I32 or Q8_1 was a division by zero, a segmentation fault or an endless loop
in all of them.
"""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hostile import assert_outcomes
from tiny import KEYS, OWN, make_tiny, write_tiny

ARCHITECTURES = """qwen2 qwen3 qwen2moe gemma gemma2 gemma3 phi2 gpt2 starcoder2 stablelm
falcon gptneox bloom mpt olmo2 internlm2 granite command-r mamba""".split()  # noqa: SIM905

ZERO = """embedding_length attention.head_count attention.head_count_kv rope.dimension_count
feed_forward_length attention.key_length attention.value_length attention.sliding_window
expert_used_count ssm.conv_kernel ssm.inner_size ssm.state_size ssm.time_step_rank
block_count context_length vocab_size rope.dimension_sections""".split()  # noqa: SIM905


def wrong_types(array):
    """One array in types that no kernel multiplies by, or that do not fit its rows."""
    rows, width = array.shape
    yield "i32", array.astype(np.int32)
    yield "i8", array.astype(np.int8)
    yield "f64", array.astype(np.float64)
    if width % 32 == 0:
        blocks = np.zeros((rows, width // 32 * 36), np.uint8)
        yield "q8_1", (blocks, GGMLQuantizationType.Q8_1)


def test_a_matrix_that_the_loader_does_without_and_the_graph_does_not(tmp_path):
    make_tiny("phi3", tmp_path / "phi3.gguf")  # without blk.N.attn_qkv
    assert_outcomes({tmp_path / "phi3.gguf": "lacks a matrix that its architecture needs"})


def test_an_encoder_without_a_cache(tmp_path):
    make_tiny("modern-bert", tmp_path / "encoder.gguf")  # before: an endless loop
    assert_outcomes({tmp_path / "encoder.gguf": "it is not causal"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures(architecture, tmp_path):
    tensors, keys = make_tiny(architecture, tmp_path / "good.gguf")
    wanted = {tmp_path / "good.gguf": "runs"}

    matrices = [name for name, array in tensors.items() if array.ndim == 2 and "norm" not in name]
    picked = {name.split(".")[-2]: name for name in matrices}  # one of each kind
    for kind, name in picked.items():
        for type_name, value in wrong_types(tensors[name]):
            path = tmp_path / f"{kind}-{type_name}.gguf"
            write_tiny(architecture, path, {**tensors, name: value}, keys)
            wanted[path] = f"has type {type_name}"
    vector = next(name for name, array in tensors.items() if array.ndim == 1)
    path = tmp_path / "vector-i32.gguf"
    write_tiny(architecture, path, {**tensors, vector: tensors[vector].astype(np.int32)}, keys)
    wanted[path] = "has type i32; a vector must be f32"

    # any sentence, or it runs: no crash and no endless loop
    for key in ZERO:
        for value in (0, 1, 3, 7, 2**31, 2**32 - 1):
            path = write_tiny(
                architecture, tmp_path / f"{key}-{value}.gguf", tensors, {**keys, key: value}
            )
            wanted[path] = None
    said = {**KEYS, **OWN.get(architecture, {})}
    if said["attention.head_count"]:
        for key in ("attention.head_count", "rope.dimension_count"):
            wanted[tmp_path / f"{key}-0.gguf"] = f"{architecture}.{key} is 0"
    assert_outcomes(wanted)
