"""LoRA adapters in the fused node: the logits of the ordinary graph, with the node's promises.

test_adapters.py holds both to PEFT."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, quants
from sessions import NOISE, SHAPE, TOKENS, Session, decode, distance, load

from mobilellm_cpp.engine.library import llama_cpp

WIDTHS = {  # in, out
    "attn_q": (SHAPE["hidden"], SHAPE["hidden"]),
    "attn_k": (SHAPE["hidden"], 128),
    "attn_v": (SHAPE["hidden"], 128),
    "attn_output": (SHAPE["hidden"], SHAPE["hidden"]),
    "ffn_gate": (SHAPE["hidden"], SHAPE["ffn"]),
    "ffn_up": (SHAPE["hidden"], SHAPE["ffn"]),
    "ffn_down": (SHAPE["ffn"], SHAPE["hidden"]),
}


def lora_file(
    path: Path, arch: str, names: dict[str, tuple[int, int]], rank: int = 8, type: Type = Type.F32
) -> Path:
    """Random pairs of these matrices, each some tenths of its matrix."""
    rng = np.random.default_rng(rank)
    writer = GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * rank)
    for name, (n_in, n_out) in names.items():
        a = rng.normal(size=(rank, n_in)) * n_in**-0.5
        b = rng.normal(size=(n_out, rank)) * 0.2 * rank**-0.5
        a = np.ascontiguousarray(a.T) if name == "token_embd" else a  # of which rows are taken
        writer.add_tensor(f"{name}.weight.lora_a", quants.quantize(a, type), raw_dtype=type)
        writer.add_tensor(f"{name}.weight.lora_b", b.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_blocks(*blocks: int) -> dict[str, tuple[int, int]]:
    return {f"blk.{block}.{name}": sizes for block in blocks for name, sizes in WIDTHS.items()}


def use(session: Session, *adapters: tuple[object, float]) -> None:
    n = len(adapters)
    pointers = (llama_cpp.llama_adapter_lora_p_ctypes * n)(*(each for each, _ in adapters))
    scales = (ctypes.c_float * n)(*(scale for _, scale in adapters))
    assert not llama_cpp.llama_set_adapters_lora(session.ctx, pointers, n, scales)


def adapter(llm: object, path: Path) -> object:
    loaded = llama_cpp.llama_adapter_lora_init(llm.model, str(path).encode())
    assert loaded
    return loaded


@pytest.mark.parametrize("name", ["llama", "q4_0", "shared", "reverse", "untied", "f16"])
@pytest.mark.parametrize("n", [1, 12, 50])
def test_the_same_logits_as_the_ordinary_graph(files, ordinary, tmp_path, name, n):
    """Two adapters, of all matrices of some blocks, with scales; and none again."""
    arch = "mobilellm" if name in ("shared", "reverse") else "llama"
    llm = load(files[name])
    x = adapter(llm, lora_file(tmp_path / "x.gguf", arch, of_blocks(0, 1)))
    y = adapter(llm, lora_file(tmp_path / "y.gguf", arch, of_blocks(1, 2), rank=5))

    def run():
        session = Session(llm)
        use(session, (x, 1.0), (y, -0.5))
        rows = []
        for first in range(0, 50, n):
            rows.append(session.whole(TOKENS[first : min(first + n, 50)], first))
        llama_cpp.llama_memory_clear(session.memory, True)
        use(session)
        rows.append(session.whole(TOKENS[:n]))
        session.close()
        return np.concatenate(rows)

    got, want = run(), ordinary(run)
    assert distance(got[:n], got[50:]) > 0.2  # the adapters do something
    for part in (slice(50), slice(50, None)):
        assert 0 < distance(got[part], want[part]) < NOISE


@pytest.mark.parametrize("type", [Type.F16, Type.BF16, Type.Q8_0])
def test_pairs_of_any_type(files, ordinary, tmp_path, type):
    llm = load(files["llama"])
    each = adapter(llm, lora_file(tmp_path / "x.gguf", "llama", of_blocks(0, 1, 2), type=type))

    def run():
        session = Session(llm)
        use(session, (each, 1.0))
        rows = session.run(TOKENS[:20])
        session.close()
        return rows

    assert 0 < distance(run(), ordinary(run)) < NOISE


def test_no_bit_depends_on_threads_or_other_tokens(files, tmp_path):
    llm = load(files["shared"])
    each = adapter(llm, lora_file(tmp_path / "x.gguf", "mobilellm", of_blocks(0, 1, 2), rank=16))
    alone = None
    for n_threads in (1, 2, 3, 5):
        session = Session(llm, n_threads=n_threads, n_threads_batch=n_threads)
        use(session, (each, 1.0))
        few, prompt = session.run(TOKENS[:12]), session.whole(TOKENS[12:80], 12)
        llama_cpp.llama_memory_clear(session.memory, True)
        assert np.array_equal(session.whole(TOKENS[:12]), few)
        session.close()
        alone = alone or (few, prompt)
        assert np.array_equal(few, alone[0]) and np.array_equal(prompt, alone[1]), n_threads


def test_sequences_with_caches_of_their_own(files, tmp_path):
    llm = load(files["llama"])
    pair = adapter(llm, lora_file(tmp_path / "x.gguf", "llama", of_blocks(0, 1)))

    def run(*texts, **params):
        session = Session(llm, **params)
        use(session, (pair, 1.0))
        pieces = (range(20), range(20, 25), range(25, 26))
        rows = [
            session.batch([(text[i], i, s) for s, text in enumerate(texts) for i in piece])
            for piece in pieces
        ]
        session.close()
        return np.concatenate([each.reshape(len(texts), -1, each.shape[-1]) for each in rows], 1)

    texts = TOKENS[:30], TOKENS[30:60], TOKENS[60:]
    rows = run(*texts, n_seq_max=3, n_ctx=768)
    assert np.array_equal(rows, np.concatenate([run(text) for text in texts]))


def test_pairs_beside_the_blocks(files, ordinary, tmp_path):
    """Pairs of the output matrix and of the embedding run in nodes of their own."""
    llm = load(files["untied"])
    head = {"output": (SHAPE["hidden"], 519), **of_blocks(1)}
    table = {"token_embd": (519, SHAPE["hidden"]), **of_blocks(1)}
    for names in (head, table):
        each = adapter(llm, lora_file(tmp_path / "x.gguf", "llama", names))

        def run(each=each):
            session = Session(llm)
            use(session, (each, 1.0))
            rows = session.run(TOKENS[:10])
            session.close()
            return rows

        got, want = run(), ordinary(run)
        assert distance(got, decode(files["untied"], TOKENS[:10])) > 0.2
        assert 0 < distance(got, want) < NOISE
