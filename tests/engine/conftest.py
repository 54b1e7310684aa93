"""Models and settings for the tests of the fused node."""

import ctypes

import pytest
from checkpoints import make_checkpoint, make_pro, make_r1
from sessions import F16, SHAPE, Session

from mobilellm_cpp import convert_checkpoint
from mobilellm_cpp.engine.library import llama_cpp


@llama_cpp.ggml_backend_sched_eval_callback
def watch(tensor, ask, data):
    return False


@pytest.fixture
def ordinary(monkeypatch):
    """Calls a function with the fused node left out."""

    def call(function, *arguments, **keywords):
        with monkeypatch.context() as patch:
            patch.setitem(Session.defaults, "cb_eval", watch)
            return function(*arguments, **keywords)

    return call


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Files by name: a plain Llama, layer-shared ones, R1 with a layer without RoPE, Pro."""
    folder = tmp_path_factory.mktemp("fused")
    plain = make_checkpoint(folder / "plain", **SHAPE)
    convert_checkpoint(plain, folder / "llama.gguf", type="q8_0")
    convert_checkpoint(plain, folder / "q4_0.gguf", type="q4_0")
    convert_checkpoint(plain, folder / "shared.gguf", type="q4_0", schedule="immediate")
    convert_checkpoint(plain, folder / "reverse.gguf", type="q8_0", schedule="reverse")
    untied = make_checkpoint(folder / "untied", **SHAPE, tied=False, vocab=519)
    convert_checkpoint(untied, folder / "untied.gguf", type="q8_0")
    convert_checkpoint(untied, folder / "f32.gguf", type="f32")
    convert_checkpoint(plain, folder / "f16.gguf", type="f16")
    convert_checkpoint(plain, folder / "bf16.gguf", type="bf16", schedule="immediate")
    # beside packed matrices one that is not
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.output_tensor_type = 7, F16
    names = [str(folder / name).encode() for name in ("f32.gguf", "f16-head.gguf")]
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(options)) == 0
    r1 = make_r1(folder / "r1", rope=[1, 0, 1], dtype="f32")
    convert_checkpoint(r1, folder / "r1.gguf", type="q8_0")
    pro = make_pro(folder / "pro", sliding=[0, 1, 1], dtype="f32")
    convert_checkpoint(pro, folder / "pro.gguf", type="q8_0")
    return {path.stem: path for path in folder.glob("*.gguf")}
