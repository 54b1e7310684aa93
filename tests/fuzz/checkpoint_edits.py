"""A checkpoint folder changed, soundly or not. An edit is a list of plain values:

    ["json", file, path, value]     a place in a JSON file; path lists keys and indexes
    ["json-drop", file, path]
    ["json-raw", file, path, text]  text that stands there instead of a JSON value
    ["name", file, path, new]       another name for a key
    ["tensor", file, name, field, value]    field: dtype or shape; offsets and data follow suit
    ["data", file, name, at, hex]   weights
    ["length", file, n]             the length of the header that a safetensors file claims
    ["piece", i, part, value]       SentencePiece: part is text, score or type of a piece
    ["piece-drop", i], ["piece-again", i]
    ["model", path, value]          a field put behind the SentencePiece model: it counts; path
                                    lists field numbers; value is an integer or hex
    ["pickle", n, kind, value]      the n-th integer or text (kind) in the pickle of a .bin
    ["bytes", file, at, hex], ["cut", file, n], ["grow", file, n]
    ["file", file, text], ["remove", file], ["copy", file, new]
    ["link", file, target], ["pipe", file], ["folder", file]    in place of the file

A `file` ending in #header is the JSON header of a safetensors file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickletools
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

from fuzz import strange

Edit = list[Any]
Files = dict[str, bytes]

HEADER = "#header"
# what an edit can run into where an earlier one has been
UNFIT = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I64": 8, "F8_E4M3": 1}


def read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(seed: Files, edits: list[Edit], folder: Path) -> None:
    """The seed with the edits as a new folder; edits that do not fit (any more) do nothing."""
    files = dict(seed)
    special = []
    for edit in edits:
        if edit[0] in ("link", "pipe", "folder"):
            special.append(edit)
            files.pop(edit[1], None)
        else:
            with contextlib.suppress(*UNFIT):
                apply(files, edit)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for op, name, *target in special:
        path = folder / name
        if os.path.lexists(path):
            continue
        if op == "link":
            path.symlink_to(target[0])
        elif op == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()


def apply(files: Files, edit: Edit) -> None:
    op, *rest = edit
    if op in ("piece", "piece-drop", "piece-again", "model"):
        if "tokenizer.model" in files:
            files["tokenizer.model"] = edit_sentencepiece(files["tokenizer.model"], op, rest)
        return
    if op == "pickle":
        for name in [name for name in files if name.endswith(".bin")][:1]:
            files[name] = edit_pickle(files[name], *rest)
        return
    name = rest[0]
    plain = name.removesuffix(HEADER)
    if op == "file":
        files[name] = rest[1].encode("utf-8", "surrogatepass")
    if plain not in files:
        return
    content = files[plain]
    if op == "remove":
        del files[plain]
    elif op == "copy":
        files[rest[1]] = content
    elif op == "bytes":
        raw = bytes.fromhex(rest[2])
        files[plain] = content[: rest[1]] + raw + content[rest[1] + len(raw) :]
    elif op == "cut":
        files[plain] = content[: rest[1]]
    elif op == "grow":
        files[plain] = content + bytes(rest[1])
    elif op == "length":
        files[plain] = struct.pack("<Q", rest[1] % 2**64) + content[8:]
    elif op == "tensor":
        files[plain] = edit_tensor(content, *rest[1:])
    elif op == "data":
        header, start = parse_header(content)
        if rest[1] in header:
            at, raw = start + header[rest[1]]["data_offsets"][0] + rest[2], bytes.fromhex(rest[3])
            files[plain] = content[:at] + raw + content[at + len(raw) :]
    elif op.startswith("json") or op == "name":
        edit_json(files, name, op, rest[1:])


# JSON


def load(files: Files, name: str) -> Any:
    if name.endswith(HEADER):
        return parse_header(files[name.removesuffix(HEADER)])[0]
    return json.loads(files[name])


def edit_json(files: Files, name: str, op: str, rest: list[Any]) -> None:
    path, *value = rest
    try:
        root = [load(files, name)]
    except ValueError:
        return
    place: Any = root
    *way, last = [0, *path]
    try:
        for step in way:
            place = place[step]
        place[last]
    except (KeyError, IndexError, TypeError):
        if op != "json" or not isinstance(place, dict):
            return
    if op == "json-drop":
        del place[last]
    elif op == "name":
        if isinstance(place, dict):
            changed = {value[0] if key == last else key: item for key, item in place.items()}
            place.clear()
            place.update(changed)
    else:
        place[last] = "\ue000raw\ue000" if op == "json-raw" else value[0]
    if not root:
        return
    text = json.dumps(root[0])
    if op == "json-raw":
        text = text.replace(json.dumps("\ue000raw\ue000"), value[0])
    raw = text.encode("utf-8", "surrogatepass")
    if name.endswith(HEADER):
        plain = name.removesuffix(HEADER)
        raw += b" " * (-len(raw) % 8)
        raw = struct.pack("<Q", len(raw)) + raw + files[plain][parse_header(files[plain])[1] :]
        files[plain] = raw
    else:
        files[name] = raw


# safetensors


def parse_header(content: bytes) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), start


def edit_tensor(content: bytes, name: str, field: str, value: Any) -> bytes:
    header, start = parse_header(content)
    if name not in header:
        return content
    header[name][field] = value
    body = b""
    for entry in header.values():
        if "data_offsets" not in entry:
            continue
        first, last = entry["data_offsets"]
        data = content[start + first : start + last]
        if entry is header[name]:
            n = WIDTHS[entry["dtype"]]
            for dim in entry["shape"]:
                n = min(n * dim, 1 << 20)
            data = (data * (n // max(1, len(data)) + 1))[:n]
        entry["data_offsets"] = [len(body), len(body) + len(data)]
        body += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# SentencePiece: a protobuf message. Field 1 is a piece (1 text, 2 score, 3 type), 2 the trainer's
# settings, 3 the normalizer's.


def varint(n: int) -> bytes:
    out = b""
    n %= 2**64
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def message(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def fields(raw: bytes) -> list[tuple[int, int, bytes]]:
    """Number, wire type and bytes (of the payload) of the fields of a sound message."""
    found = []
    at = 0

    def take_varint() -> int:
        nonlocal at
        n = shift = 0
        while True:
            byte = raw[at]
            at += 1
            n |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return n

    while at < len(raw):
        tag = take_varint()
        first = at
        if tag & 7 == 0:
            take_varint()
        elif tag & 7 == 2:
            n = take_varint()
            first, at = at, at + n
        else:
            at += 4 if tag & 7 == 5 else 8
        found.append((tag >> 3, tag & 7, raw[first:at]))
    return found


def edit_sentencepiece(raw: bytes, op: str, rest: list[Any]) -> bytes:
    if op == "model":
        path, value = rest
        out: int | bytes = value if isinstance(value, int) else bytes.fromhex(value)
        for number in reversed(path):
            out = message(number, out)
        assert isinstance(out, bytes)
        return raw + out
    try:
        top = fields(raw)
    except IndexError:
        return raw
    pieces = [i for i, field in enumerate(top) if field[0] == 1]
    at = pieces[rest[0] % len(pieces)]
    piece = top[at][2]
    if op == "piece-drop":
        del top[at]
    elif op == "piece-again":
        top.append(top[at])
    else:
        part, value = rest[1:]
        if part == "text":
            piece += message(1, value.encode("utf-8", "surrogatepass"))
        elif part == "score":
            piece += varint(2 << 3 | 5) + struct.pack("<f", value)
        else:
            piece += message(3, value)
        top[at] = (1, 2, piece)
    out = b""
    for number, wire, payload in top:
        length = varint(len(payload)) if wire == 2 else b""
        out += varint(number << 3 | wire) + length + payload
    return out


# torch.save


def edit_pickle(content: bytes, n: int, kind: str, value: Any) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        name = next(name for name in members if name.endswith("data.pkl"))
        ops = list(pickletools.genops(members[name]))
    except (zipfile.BadZipFile, StopIteration, ValueError):
        return content
    wanted: Any = int if kind == "integer" else str
    # booleans are integers to Python; memo numbers are no values
    places = [
        (at, end[2])
        for (op, argument, at), end in zip(ops, ops[1:], strict=False)
        if type(argument) is wanted and "PUT" not in op.name and "GET" not in op.name
        if op.name != "PROTO" and at is not None
    ]
    at, end = places[n % len(places)]
    if kind == "integer":
        raw = b"I" + str(value).encode() + b"\n"
    elif members[name][at : at + 1] == b"c":
        module, _, attribute = value.partition(" ")
        raw = f"c{module}\n{attribute}\n".encode("utf-8", "replace")
    else:
        text = value.encode("utf-8", "surrogatepass")
        raw = b"X" + struct.pack("<I", len(text)) + text
    members[name] = members[name][:at] + raw + members[name][end:]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member), data)
    return out.getvalue()


# Drawing edits.

# Fields that change what a config means where they appear.
FURTHER_FIELDS: dict[str, Any] = {
    "head_dim": 16,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "factor": 1},
    "partial_rotary_factor": 0.5,
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention"],
    "no_rope_layers": [1, 0],
    "no_rope_layer_interval": 4,
    "use_qk_norm": True,
    "intermediate_size_mlp": 64,
    "num_local_experts": 0,
    "interleave_moe_layer_step": 1,
    "attn_temperature_tuning": False,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "text_config": {},
    "quantization_config": {"quant_method": "x"},
    "mlp_bias": True,
    "layer_sharing": True,
    "share_embedding": True,
    "tie_word_embeddings": True,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "unk_token_id": 0,
    "torch_dtype": "float8",
    "auto_map": {"AutoModel": "evil.Model"},
}
FURTHER_SETTINGS: dict[str, Any] = {
    "added_tokens_decoder": {"5": {"content": "<x>", "special": True}},
    "chat_template": "{{ messages[0].content }}",
    "add_prefix_space": False,
    "add_eos_token": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"content": "<s>"},
}
FURTHER_FILES = {
    "added_tokens.json": ['{"<x>": 300}', '{"<x>": -1}', '{"<x>": 5, "<y>": 5}', "[]", '{"": 7}'],
    "chat_template.jinja": ["{{ messages[0].content }}", "\ud800", "{% for", "", "\0"],
    "generation_config.json": ['{"eos_token_id": [2, 3]}', '{"eos_token_id": [1e9, "x"]}', "["],
    "tokenizer.json": ["{}", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "nul"],
    "model.safetensors": ["", "\0\0\0\0\0\0\0\0", "\2\0\0\0\0\0\0\0{}"],
    "pytorch_model.bin": ["", "PK\3\4", "PK\5\6" + "\0" * 18],
    "pytorch_model.bin.index.json": ['{"weight_map": {"x": "pytorch_model.bin"}}'],
    "model.safetensors.index.json": ['{"weight_map": {"x": "model.safetensors"}}'],
}
RAW = ["1e999", "-1e999", "NaN", "-Infinity", "1" * 5000, "0.1e-400", "[" * 2000, '{"a":1,"a":2}']
RAW += ['"\\ud800"', "tru", "1.", "-0", "1E5", '"\t"', "\ufeff1", "[1,]"]
GLOBALS = ["os system", "builtins eval", "builtins exec", "posix system", "torch FloatStorage"]
GLOBALS += ["torch._utils _rebuild_tensor_v2", "collections OrderedDict", "torch LongStorage"]


def draw(rng: random.Random, seed: Files) -> list[Edit]:
    """A few edits for the seed; most leave files that can be parsed."""
    makers = [config_edit] * 6 + [tokenizer_edit] * 5 + [weights_edit] * 6 + [index_edit] * 2
    makers += [file_edit] * 2 + [byte_edit]
    edits: list[Edit] = []
    while not edits or rng.random() < 0.35:
        edits += rng.choice(makers)(rng, seed)
    return edits


def some_path(rng: random.Random, tree: Any, stop: float) -> list[Any]:
    """A way from the root of a tree to some place in it."""
    path: list[Any] = []
    while isinstance(tree, (dict, list)) and tree and (not path or rng.random() > stop):
        step = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        path.append(step)
        tree = tree[step]
    return path


def tree_edit(rng: random.Random, files: Files, name: str, stop: float = 0.2) -> list[Edit]:
    """An edit at some place of a JSON file."""
    tree = load(files, name)
    path = some_path(rng, tree, stop)
    if not path:
        return [["json", name, [], strange.json_value(rng, tree)]]
    old = tree
    for step in path:
        old = old[step]
    way = rng.random()
    if way < 0.08:
        return [["json-drop", name, path]]
    if way < 0.12:
        return [["json-raw", name, path, rng.choice(RAW)]]
    if way < 0.2 and isinstance(path[-1], str):
        return [["name", name, path, strange.text(rng, path[-1])]]
    return [["json", name, path, strange.json_value(rng, old)]]


def further(rng: random.Random, name: str, known: dict[str, Any]) -> list[Edit]:
    key, value = rng.choice(list(known.items()))
    if rng.random() < 0.4:
        value = strange.json_value(rng, value)
    elif isinstance(value, dict) and value:
        inner = rng.choice(list(value))
        value = {**value, inner: strange.json_value(rng, value[inner])}
    return [["json", name, [key], value]]


def config_edit(rng: random.Random, files: Files) -> list[Edit]:
    if rng.random() < 0.3:
        return further(rng, "config.json", FURTHER_FIELDS)
    return tree_edit(rng, files, "config.json")


def tokenizer_edit(rng: random.Random, files: Files) -> list[Edit]:
    names = [name for name in files if "token" in name or name == "generation_config.json"]
    name = rng.choice(names)
    if name != "tokenizer.model":
        if name == "tokenizer_config.json" and rng.random() < 0.5:
            return further(rng, name, FURTHER_SETTINGS)
        return tree_edit(rng, files, name)
    way = rng.random()
    i = rng.choice([0, 1, 2, 3, rng.randrange(400)])
    if way < 0.3:
        return [["piece", i, "text", strange.text(rng, "\u2581ba")]]
    if way < 0.45:
        return [["piece", i, "score", rng.choice([0.0, -1.5, 1e38, float("nan"), float("inf")])]]
    if way < 0.6:
        return [["piece", i, "type", rng.choice([0, 1, 2, 3, 4, 5, 6, 7, -1, 2**31])]]
    if way < 0.7:
        return [[rng.choice(["piece-drop", "piece-again"]), i]]
    if way < 0.85:  # trainer: model type, byte fallback, ids of unk, bos, eos, pad
        number = rng.choice([3, 4, 35, 40, 41, 42, 43])
        return [["model", [2, number], strange.integer(rng, 2)]]
    if way < 0.95:  # normalizer: charsmap, dummy prefix, whitespace, escape; 5 is the denormalizer
        if rng.random() < 0.5:
            size = rng.choice([0, 4, 8, 64, 1024])
            raw = struct.pack("<I", rng.choice([size, 4, 2**32 - 1])) + rng.randbytes(size)
            return [["model", [rng.choice([3, 5]), 2], raw.hex()]]
        return [["model", [3, rng.choice([3, 4, 5])], rng.choice([0, 1])]]
    return [["cut", name, rng.randrange(len(files[name]))]]


def weights_edit(rng: random.Random, files: Files) -> list[Edit]:
    name = rng.choice([name for name in files if name.endswith((".safetensors", ".bin"))])
    if name.endswith(".bin"):
        if rng.random() < 0.3:
            at = rng.randrange(len(files[name]))
            return [["bytes", name, at, strange.raw_bytes(rng, rng.choice([1, 4, 64])).hex()]]
        if rng.random() < 0.6:
            return [["pickle", rng.randrange(400), "integer", strange.integer(rng, 32)]]
        words = [*GLOBALS, "cpu", "cuda:0", "meta", "0", "999", "../0", "x", ""]
        return [["pickle", rng.randrange(200), "text", rng.choice(words)]]
    header, _ = parse_header(files[name])
    tensor = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[tensor]
    way = rng.random()
    if way < 0.15:
        return [["tensor", name, tensor, "dtype", rng.choice(list(WIDTHS))]]
    if way < 0.35:
        shape = list(entry["shape"])
        i = rng.randrange(len(shape))
        shape[i] = abs(strange.integer(rng, shape[i]))
        shape = rng.choice([shape, shape[::-1], [*shape, 1], [], shape[:1]])
        return [["tensor", name, tensor, "shape", shape]]
    if way < 0.6:
        at = rng.randrange(max(1, entry["data_offsets"][1] - entry["data_offsets"][0]))
        raw = strange.raw_bytes(rng, rng.choice([1, 2, 4, 64, 512]))
        return [["data", name, tensor, at & ~1, raw.hex()]]
    if way < 0.65:
        return [["length", name, strange.integer(rng, 500)]]
    if way < 0.8:
        return [
            ["name", name + HEADER, [tensor], rng.choice([*header, tensor + "x", "lm_head.weight"])]
        ]
    field = rng.choice(["data_offsets", "shape", "dtype"])
    path = [tensor, field]
    if field != "dtype":
        path.append(rng.randrange(len(entry[field])))
    old: Any = header
    for step in path:
        old = old[step]
    return [["json", name + HEADER, path, strange.json_value(rng, old)]]


def index_edit(rng: random.Random, files: Files) -> list[Edit]:
    names = [name for name in files if name.endswith(".index.json")]
    if not names:
        return file_edit(rng, files)
    name = names[0]
    tree = load(files, name)
    tensor = rng.choice(list(tree["weight_map"]))
    if rng.random() < 0.3:
        return tree_edit(rng, files, name, stop=0.4)
    shards = sorted(set(tree["weight_map"].values()))
    own = shards[0]
    targets = [*shards, "../" + own, "./" + own, own.upper(), own + "/", "/" + own, own + "\0"]
    targets += ["", ".", "..", "a\\b", "x.safetensors", "config.json", None, 7, [own], {}]
    return [["json", name, ["weight_map", tensor], rng.choice(targets)]]


def file_edit(rng: random.Random, files: Files) -> list[Edit]:
    way = rng.random()
    if way < 0.5:
        name = rng.choice(list(FURTHER_FILES))
        return [["file", name, rng.choice(FURTHER_FILES[name])]]
    name = rng.choice(list(files))
    if way < 0.6:
        return [["remove", name]]
    if way < 0.7:
        return [["copy", name, rng.choice([*files, *FURTHER_FILES])]]
    if way < 0.8:
        return [[rng.choice(["pipe", "folder"]), name]]
    targets = ["/dev/zero", "/dev/null", "../outside", "../../outside", "nowhere", name]
    return [["link", name, rng.choice(targets)]]


def byte_edit(rng: random.Random, files: Files) -> list[Edit]:
    name = rng.choice(list(files))
    total = len(files[name])
    way = rng.random()
    if way < 0.3:
        return [["cut", name, rng.randrange(total)]]
    if way < 0.4:
        return [["grow", name, rng.choice([1, 8, 4096])]]
    raw = strange.raw_bytes(rng, rng.choice([1, 1, 2, 4, 8]))
    return [["bytes", name, rng.randrange(min(total, 4096)), raw.hex()]]
