"""A checkpoint folder changed, soundly or not. An edit is a list of plain values:

    ["json", file, path, value]     a place in a JSON file; path lists keys and indexes
    ["json-drop", file, path]
    ["json-raw", file, path, text]  text that stands there instead of a JSON value
    ["name", file, path, new]       another name for a key
    ["repeat", file, path, n]       a list or a text n times
    ["doubled", n]                  tokenizer.json: n tokens, each twice the one before, and merges
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
import struct
import zipfile
from pathlib import Path
from typing import Any

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
    if op == "doubled":
        files["tokenizer.json"] = double_tokens(json.loads(files["tokenizer.json"]), *rest)
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
    elif op == "repeat":
        old = load(files, name)
        for step in rest[1]:
            old = old[step]
        edit_json(files, name, "json", [rest[1], old * rest[2]])
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


def double_tokens(fields: dict[str, Any], n: int) -> bytes:
    vocab, merges = fields["model"]["vocab"], fields["model"]["merges"]
    token = "a"
    for _ in range(n):
        vocab.setdefault(token + token, len(vocab))
        merges.append([token, token])
        token += token
    return json.dumps(fields).encode()


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
