"""Ways in which a file can be other than it should be; every function is deterministic in its generator."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]  # a directory: contents by relative name
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146" + b"0" * 56 + b"\nsize 12345\n"

# Written by name where a value stands, and put in as text: JSON's writer refuses them.
_WRITTEN = {
    '"@huge"': "9" * 5000,
    '"@deep"': "[" * 3000 + "]" * 3000,
    '"@deep_object"': '{"a":' * 2000 + "1" + "}" * 2000,
    '"@nan"': "NaN",
    '"@inf"': "-Infinity",
    '"@bare"': "undefined",
    '"@escaped"': '"\\ud83d"',
}
ODD_VALUES: tuple[Any, ...] = (
    *(name[1:-1] for name in _WRITTEN),
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 1e308, -1e-320, 0.5, 1_000_000,
    "", "x", "17", "1e400", "x" * 100_000, "\x1b[31mred\x07", "\u202egnp.exe", "\u2028", "\x00", "ż" * 300, "None",
    "../../../../etc/passwd", "/etc/passwd", "(a+)+$", "(", "{instruction", "%s%n{0}", "remove", "chat",
    [], {}, [[]], [None], [1, "a", None], {"a": 1}, {"": None}, [{}], [["role", "user"]], {"role": "user"},
)  # fmt: skip


def to_text(value: Any) -> str:
    """JSON, with what JSON's own writer refuses."""
    text = json.dumps(value)
    for name, written in _WRITTEN.items():
        text = text.replace(name, written)
    return text


def raw(rng: random.Random, content: bytes) -> bytes:
    """The bytes, damaged without knowing what they mean."""
    at = rng.randrange(len(content) + 1)
    to = min(len(content), at + rng.choice((1, 8, 64, 500)))

    def flipped() -> bytes:
        out = bytearray(content or b"\0")
        for _ in range(rng.choice((1, 1, 2, 8, 50))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        return bytes(out)

    ways: tuple[Callable[[], bytes], ...] = (
        flipped,
        flipped,
        flipped,
        lambda: content[:at],
        lambda: content[at:],
        lambda: content[:at] + content[to:],
        lambda: content[:at] + rng.randbytes(rng.choice((1, 4, 32))) + content[at:],
        lambda: content[:to] + content[at:],
        lambda: b"",
        lambda: POINTER,
        lambda: rng.randbytes(200),
        lambda: b"\0" * max(len(content), 1),
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode("latin-1").encode("utf-16"),
        lambda: content.decode("latin-1").encode("utf-32-le"),
        lambda: content + b"\xe9\xff",
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.replace(b"\n", b"\r"),
        lambda: b"\x1f\x8b\x08\x00" + content,
        lambda: content + b"\x1b]0;title\x07",
        lambda: b"[" * 5000,
        lambda: b'{"a":' * 5000,
        lambda: b"<!DOCTYPE html><title>404 Not Found</title>",
    )
    return rng.choice(ways)()


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every path into a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inside for place in _places(part, (*path, key)))]


def json_value(rng: random.Random, value: Any) -> Any:
    """The value with one or a few of its parts of another kind, absent, renamed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Few steps down more often: a vocabulary has thousands of places.
        places = _places(value)
        depth = rng.randrange(max(map(len, places)) + 1)
        path = rng.choice([place for place in places if len(place) <= depth])
        if not path:
            if rng.random() < 0.1:
                value = rng.choice((rng.choice(ODD_VALUES), [value], {"content": value}))
            elif isinstance(value, dict):
                value[rng.choice(("unknown", "\x1b[2J", "", "a" * 5000, "auto_map", "é"))] = rng.choice(ODD_VALUES)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        way = rng.randrange(6)
        if way == 0:
            del parent[key]
        elif way == 1 and isinstance(parent, dict):
            parent[rng.choice((key.upper(), key + " ", "\x1b[31m" + key))] = parent.pop(key)
        elif way == 2 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value


def json_file(rng: random.Random, content: bytes) -> bytes:
    """A JSON file, damaged as text or as a value."""
    if rng.random() < 0.25:
        return raw(rng, content)
    return to_text(json_value(rng, json.loads(content))).encode("utf-8", "surrogatepass")


def json_lines(rng: random.Random, content: bytes) -> bytes:
    """JSON lines, one of them damaged, or all of it."""
    if rng.random() < 0.25:
        return raw(rng, content)
    lines = content.split(b"\n")
    k = rng.randrange(len(lines))
    if lines[k]:
        lines[k] = json_file(rng, lines[k])
    return b"\n".join(lines)


def toml_file(rng: random.Random, content: bytes) -> bytes:
    """TOML, damaged as text, or with another value, key or line."""
    if rng.random() < 0.25:
        return raw(rng, content)
    lines = content.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        k = rng.randrange(len(lines))
        key, _, value = lines[k].partition(" = ")
        odd = (
            "1979-05-27T07:32:00Z", "07:32:00", "nan", "-inf", "1e999", "9" * 5000, '"\\u001b[31m"', "[" * 2000,
            "{ a = 1 }", "{ messages = 1 }", "true", "[]", "''", '"""\nlong\n"""', "0x7fffffffffffffff", "-1",
            f'"{"y" * 50_000}"', '"{instruction}{input}{other}"', '"{instruction!r:>99999}"', '"chat"', '"none"',
            '"/nonexistent.jinja"', "2026-13-45", "[[1, 2], ['a']]", "1e308",
        )  # fmt: skip
        lines[k] = rng.choice(
            (
                "",
                f"{key} = {rng.choice(odd)}",
                f"{key} = {rng.choice(odd)}",
                f"{key} = {rng.choice(odd)}",
                f'"{key}\\u001b[0m" = {value}',
                f"{lines[k]}\n{lines[k]}",
                f"[{key}]\n{lines[k]}",
                f"{key}.x = {value}",
            )
        )
    return "\n".join(lines).encode()


def yaml_file(rng: random.Random, content: bytes) -> bytes:
    """YAML: JSON is some, and there is more to it."""
    import yaml

    bombs = (
        b"a: &a [x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nbase_model: *b\ndatasets: *b\n",
        b"base_model: !!python/object/apply:os.system ['true']\ndatasets: []\n",
        b"base_model: x\n\tdatasets: []\n",
        b"base_model: &x {a: *x}\ndatasets: *x\n",
        b"? {base_model: 1}\n: datasets\n",
        b"base_model: 2026-01-01\nsequence_len: 0o17\nmicro_batch_size: .nan\nnum_epochs: .inf\n",
        b"base_model: ~\nmicro_batch_size: 1_000\nlearning_rate: 1:30\nseed: yes\n",
        b"model_name_or_path: {1: 2, [3]: 4}\nstage: sft\n",
        b"base_model: " + b"[" * 3000,
        b"---\nbase_model: x\n---\ndatasets: y\n",
    )
    if rng.random() < 0.2:
        return rng.choice(bombs)
    if rng.random() < 0.2:
        return raw(rng, content)
    return to_text(json_value(rng, yaml.safe_load(content))).encode("utf-8", "surrogatepass")


def csv_file(rng: random.Random, content: bytes) -> bytes:
    """CSV, damaged as text or in a cell."""
    if rng.random() < 0.4:
        return raw(rng, content)
    lines = content.decode().splitlines()
    k = rng.randrange(len(lines))
    cells = lines[k].split(",")
    j = rng.randrange(len(cells))
    odd = ('"', '""', '"open', "a" * 200_000, "\0", "\x1b[31m", "x,y", "\r", "", '"a\nb"', "\ufeff", "id", "'")
    cells[j] = rng.choice(odd)
    lines[k] = ",".join(cells if rng.random() < 0.8 else cells[:j])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def safetensors_file(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file: the header, its length, or numbers that are none."""
    if rng.random() < 0.35:
        return raw(rng, content)
    size = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + size], bytearray(content[8 + size :])
    if rng.random() < 0.4:
        at = 4 * rng.randrange(len(body) // 4)
        body[at : at + 4] = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\xff\x7f"))
    else:
        changed = json_value(rng, json.loads(header))
        if isinstance(changed, dict) and changed and rng.random() < 0.3:
            entry = changed[rng.choice(list(changed))]
            if isinstance(entry, dict):
                entry["dtype"] = rng.choice(("F64", "BF16", "I64", "F8_E4M3", "BOOL", "X", None, 3))
        header = to_text(changed).encode("utf-8", "surrogatepass")
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**64 - 1, len(header) + 7))
    return length.to_bytes(8, "little") + header + bytes(body)


_BY_SUFFIX: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "json": json_file,
    "jsonl": json_lines,
    "toml": toml_file,
    "yaml": yaml_file,
    "yml": yaml_file,
    "csv": csv_file,
    "safetensors": safetensors_file,
}


def directory(rng: random.Random, files: Files, targets: list[str]) -> tuple[Files, str]:
    """The files with one of `targets` damaged, and which; absent, a directory, or of another name at times."""
    name = rng.choice(targets)
    out = dict(files)
    way = rng.random()
    if way < 0.02:
        del out[name]
    elif way < 0.04:
        out[f"{name}/inside"] = out.pop(name)
    else:
        out[name] = _BY_SUFFIX.get(name.rpartition(".")[2], raw)(rng, out[name])
    return out, name
