"""LoRA adapters: logits against PEFT's own forward pass, beside the model and merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import ALL, logits, peft_model
from batches import decode
from checkpoints import make_checkpoint, make_pro, make_r1
from mobilellm_cpp.convert import convert_adapter

from mobilellm_cpp import MobileLLM, ModelError, convert_checkpoint
from mobilellm_cpp.engine.adapters import Adapters

GGML_F32 = 0
BOUND = 2e-4  # of the largest logit
WINDOW = 16  # of Pro's sliding layers, shorter than the texts
SHAPE: dict[str, Any] = dict(layers=3, hidden=192, heads=3, kv_heads=1, ffn=256, dtype="f32")

# The checkpoint, its schedule, and the options of the adapter.
KINDS: dict[str, tuple[dict[str, Any], list[int] | None, dict[str, Any]]] = {
    "base": ({}, None, {}),
    "attention": ({}, None, {"target_modules": ["q_proj", "v_proj"], "r": 1}),
    "rslora": ({}, None, {"use_rslora": True, "r": 9}),
    "patterns": (
        {},
        None,
        {
            "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 3, r"model\.layers\.2\.mlp.*": 2},
            "alpha_pattern": {"mlp.down_proj": 3, "^model.layers.0.self_attn.k_proj": 24},
        },
    ),
    "some-blocks": ({}, None, {"layers_to_transform": [0, 2]}),
    "untied": ({"tied": False}, None, {"target_modules": [*ALL, "lm_head"]}),
    "immediate": ({}, [0, 0, 1, 1, 2, 2], {}),
    "reverse": ({}, [0, 1, 2, 2, 1, 0], {"use_rslora": True}),
    "r1": ({"rope": [1, 0, 1]}, None, {}),
    "shared-r1": ({"rope": [1, 1, 1]}, [0, 0, 1, 1, 2, 2], {"alpha_pattern": {"o_proj": 1}}),
    "pro": ({"sliding": [0, 1, 1], "rope": [1, 1, 0]}, None, {}),
    "pro-no-norm": ({"sliding": [1, 0, 1], "qk_norm": False}, None, {"use_rslora": True}),
    "shared-pro": ({"sliding": [0, 1, 0]}, [0, 0, 1, 1, 2, 2], {"rank_pattern": {"k_proj": 9}}),
    "reverse-pro-no-norm": ({"sliding": [1, 1, 0], "qk_norm": False}, [0, 1, 2, 2, 1, 0], {}),
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """(folder with checkpoint, adapter and model file; PEFT's model; schedule)."""
    options, schedule, lora = KINDS[request.param]
    folder = tmp_path_factory.mktemp("adapter")
    if "sliding" in options:
        make_pro(folder / "base", window=WINDOW, dtype="f32", **options)
    elif "rope" in options:
        make_r1(folder / "base", dtype="f32", **options)
    else:
        make_checkpoint(folder / "base", **SHAPE, **options)
    model = peft_model(folder / "base", **lora)
    model.save_pretrained(folder / "lora")
    convert_checkpoint(folder / "base", folder / "m.gguf", type="f32", schedule=schedule)
    return folder, model, schedule


def load(path: Path, **arguments: Any) -> MobileLLM:
    arguments = {"type_k": GGML_F32, "type_v": GGML_F32, "n_ctx": 256, "n_threads": 1, **arguments}
    return MobileLLM(path, **arguments)


def use(llm: MobileLLM, adapters: Adapters, lora: Any) -> None:
    llm._sequences.change(lambda: adapters.use(llm.ctx, lora))


def adapter(folder: Path, out: Path, **options: Any) -> Path:
    return convert_adapter(folder / "lora", out, base=folder / "base", **options).path


def tokens_of(seed: int, n: int = 50) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, n).tolist()


def assert_close(got: np.ndarray, want: np.ndarray, bound: float = BOUND) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= bound * np.abs(want).max()


def test_beside_the_model(trained, tmp_path):
    folder, model, schedule = trained
    path = adapter(folder, tmp_path / "a.gguf", schedule=schedule)
    tokens = tokens_of(1)
    want = logits(model, tokens, schedule)
    llm = load(folder / "m.gguf")
    plain = llm.logits(tokens)
    assert np.abs(plain - want).max() > 50 * BOUND * np.abs(want).max()
    adapters = Adapters(llm.model)
    use(llm, adapters, [(path, 1.0)])
    assert_close(llm.logits(tokens), want)
    llm._ctx.kv_cache_clear()
    one_by_one = np.concatenate([decode(llm, [(t, i, 0)]) for i, t in enumerate(tokens)])
    assert_close(one_by_one, want)
    llm._ctx.kv_cache_clear()
    use(llm, adapters, [])
    assert np.array_equal(llm.logits(tokens), plain)


def test_merged(trained, tmp_path):
    folder, model, schedule = trained
    report = convert_checkpoint(
        folder / "base",
        tmp_path / "m.gguf",
        type="f32",
        schedule=schedule,
        adapter=folder / "lora",
    )
    tokens = tokens_of(2)
    assert_close(load(report.path).logits(tokens), logits(model, tokens, schedule))
    assert "have the adapter lora merged into them" in report.notes[-1]


def test_several_at_a_time(tmp_path):
    """Each with a scale of its own; loaded once, switched without the model being loaded again."""
    base = make_checkpoint(tmp_path / "base", **SHAPE)
    convert_checkpoint(base, tmp_path / "m.gguf", type="f32", schedule="immediate")
    schedule = [0, 0, 1, 1, 2, 2]
    paths = []
    for name, options in {"x": {"r": 2}, "y": {"r": 6, "target_modules": ALL[2:]}}.items():
        peft_model(base, seed=len(paths), **options).save_pretrained(tmp_path / name)
        paths.append(tmp_path / f"{name}.gguf")
        convert_adapter(tmp_path / name, paths[-1], base=base, schedule=schedule)
    both = peft_model(base, seed=0, r=2)
    both.load_adapter(str(tmp_path / "y"), "y")
    tokens = tokens_of(3)
    llm = load(tmp_path / "m.gguf")
    adapters = Adapters(llm.model)
    plain = llm.logits(tokens)
    for x, y in [(1.0, 1.0), (0.5, -1.5), (0.0, 1.0)]:
        for module in both.modules():
            if hasattr(module, "set_scale"):
                for name, scale in (("default", x), ("y", y)):
                    if name in module.scaling:
                        module.set_scale(name, scale)
        both.base_model.set_adapter(["default", "y"])
        use(llm, adapters, [(paths[0], x), (paths[1], y)])
        assert_close(llm.logits(tokens), logits(both, tokens, schedule))
    use(llm, adapters, [(paths[0], 0.0)])
    assert np.array_equal(llm.logits(tokens), plain)
    assert len(adapters._loaded) == 2


def test_quantized_models_take_adapters_too(tmp_path):
    """Q8_0 with our packed weights: as near as the model without the adapter is."""
    base = make_checkpoint(tmp_path / "base", **SHAPE)
    model = peft_model(base)
    model.save_pretrained(tmp_path / "lora")
    convert_checkpoint(base, tmp_path / "m.gguf", type="q8_0", schedule="immediate")
    path = adapter(tmp_path, tmp_path / "a.gguf", type="f16", schedule="immediate")
    tokens, schedule = tokens_of(4), [0, 0, 1, 1, 2, 2]
    llm = load(tmp_path / "m.gguf")
    with model.disable_adapter():
        want = logits(model, tokens, schedule)
    noise = np.square(llm.logits(tokens) - want).mean()
    use(llm, Adapters(llm.model), [(path, 1.0)])
    error = np.square(llm.logits(tokens) - logits(model, tokens, schedule)).mean()
    assert noise / 2 < error < 2 * noise


def test_what_is_no_adapter_of_this_model(tmp_path):
    base = make_checkpoint(tmp_path / "base", **SHAPE)
    convert_checkpoint(base, tmp_path / "m.gguf", type="f32")
    peft_model(base).save_pretrained(tmp_path / "lora")
    llm = load(tmp_path / "m.gguf")
    adapters = Adapters(llm.model)
    with pytest.raises(ModelError, match="nothing.gguf: no such file"):
        adapters.load(tmp_path / "nothing.gguf")
    with pytest.raises(ModelError, match="m.gguf: .*adapter"):
        adapters.load(tmp_path / "m.gguf")
    shared = adapter(tmp_path, tmp_path / "shared.gguf", schedule="immediate")
    with pytest.raises(ModelError, match="shared.gguf: .*arch"):
        adapters.load(shared)
    own = adapter(tmp_path, tmp_path / "own.gguf")
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="is not a number"):
            use(llm, adapters, [(own, scale)])
    with pytest.raises(ModelError, match="named twice"):
        use(llm, adapters, [(own, 1.0), (own, 1.0)])


@pytest.mark.parametrize("kind", ["shared", "r1"])
def test_portable_files(kind, tmp_path):
    """Adapters of portable models: pairs written out like the blocks, rows ordered for qwen3."""
    schedule = [0, 0, 1, 1, 2, 2]
    if kind == "r1":
        base = make_r1(tmp_path / "base", dtype="f32")
    else:
        base = make_checkpoint(tmp_path / "base", **SHAPE)
    model = peft_model(base, alpha_pattern={"q_proj": 3})
    model.save_pretrained(tmp_path / "lora")
    options = {"schedule": schedule, "portable": True}
    report = convert_checkpoint(base, tmp_path / "m.gguf", type="f32", **options)
    path = adapter(tmp_path, tmp_path / "a.gguf", **options)
    assert report.architecture == {"r1": "qwen3", "shared": "llama"}[kind]
    tokens = tokens_of(5)
    llm = load(report.path)
    use(llm, Adapters(llm.model), [(path, 1.0)])
    assert_close(llm.logits(tokens), logits(model, tokens, schedule))


def test_a_model_is_switched_between_adapters(tmp_path):
    """By the class itself, calls of several threads in between."""
    base = make_checkpoint(tmp_path / "base", **SHAPE)
    convert_checkpoint(base, tmp_path / "m.gguf", type="f32")
    peft_model(base).save_pretrained(tmp_path / "lora")
    path = adapter(tmp_path, tmp_path / "own.gguf")
    tokens = tokens_of(4)
    plain = load(tmp_path / "m.gguf")
    without = plain.logits(tokens)
    with load(tmp_path / "m.gguf", lora=[(path, 1.0)]) as llm:
        adapted = llm.logits(tokens)
    assert not np.allclose(adapted, without)
    stream = plain.stream("hello", max_tokens=6)
    next(stream)
    plain.set_lora([(path, 1.0)])
    assert np.array_equal(plain.logits(tokens), adapted)
    "".join(stream)
    plain.set_lora([])
    assert np.array_equal(plain.logits(tokens), without)
