"""GGUF files that a test makes, from the layouts and not from the package."""

import pathlib
import struct

import numpy as np

TYPES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "Q2_0": 42}


def half(x):
    return np.asarray(x, "<f2").reshape(-1, 1).view(np.uint8).reshape(-1, 2)


def tq2_0(codes, scale):
    """Blocks of 256: byte 32 h + m, bits 2 l, element 128 h + 32 l + m."""
    fields = (codes.reshape(-1, 2, 4, 32) + 1).astype(np.uint8)
    packed = sum(fields[:, :, i] << np.uint8(2 * i) for i in range(4))
    return np.concatenate([packed.reshape(-1, 64), half(scale)], axis=1)


def tq1_0(codes, scale):
    """Blocks of 256: five trits to a byte, the first the most significant, then four."""
    trits = (codes.reshape(-1, 256) + 1).astype(int)
    parts = []
    for begin, bytes_, count in ((0, 32, 5), (160, 16, 5), (240, 4, 4)):
        part = trits[:, begin : begin + bytes_ * count].reshape(-1, count, bytes_)
        value = sum(part[:, n] * 3 ** (4 - n) for n in range(count))
        parts.append(((256 * value + 242) // 243).astype(np.uint8))
    return np.concatenate([*parts, half(scale)], axis=1)


def q2_0(codes, scale, length=64):
    """Blocks of 64 (older: 128): the scale, then four codes to a byte."""
    fields = (codes.reshape(-1, length // 4, 4) + 1).astype(np.uint8)
    packed = sum(fields[..., i] << np.uint8(2 * i) for i in range(4))
    return np.concatenate([half(scale), packed], axis=1)


def q8_0(values, scale):
    """Blocks of 32: the scale, then int8."""
    return np.concatenate([half(scale), values.reshape(-1, 32).astype(np.int8).view(np.uint8)], 1)


def q4_1(values, scale, least):
    """Blocks of 32: scale, minimum, then elements i and 16 + i in the halves of byte i."""
    q = values.reshape(-1, 32).astype(np.uint8)
    return np.concatenate([half(scale), half(least), q[:, :16] | q[:, 16:] << np.uint8(4)], axis=1)


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def typed(value):
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def write(path, metadata, tensors):
    """Tensors by name: (type, shape with the slowest axis first, bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += text(key) + typed(value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        out += text(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        number = TYPES.get(kind, kind)
        out += struct.pack("<IQ", number, len(data))
        data += raw + bytes(-len(raw) % 32)
    out += bytes(-len(out) % 32)
    pathlib.Path(path).write_bytes(out + data)
    return path


def floats(array):
    return ("F32", array.shape, np.ascontiguousarray(array, "<f4").tobytes())


class Model:
    """A decoder of one layer as a file: its metadata, tensors, and float kernels by name."""

    def __init__(self, arch="llama", kind="TQ2_0", seed=0, width=256, **metadata):
        rng = np.random.default_rng(seed)
        heads, head, vocabulary = 4, 16, 32
        self.metadata = {
            "general.architecture": arch,
            f"{arch}.block_count": 1,
            f"{arch}.context_length": 64,
            f"{arch}.embedding_length": width,
            f"{arch}.feed_forward_length": width,
            f"{arch}.attention.head_count": heads,
            f"{arch}.attention.head_count_kv": 2,
            f"{arch}.attention.key_length": head,
            f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{arch}.rope.freq_base": 10000.0,
            **metadata,
        }
        self.tensors = {"token_embd.weight": floats(rng.normal(size=(vocabulary, width)))}
        norms = {"attn_norm": width, "ffn_norm": width}
        if arch == "bitnet":
            norms |= {"attn_sub_norm": heads * head, "ffn_sub_norm": width}
        if arch == "qwen3":
            norms |= {"attn_q_norm": head, "attn_k_norm": head}
        for name, n in norms.items():
            self.tensors[f"blk.0.{name}.weight"] = floats(rng.uniform(0.5, 1.5, n))
        self.tensors["output_norm.weight"] = floats(rng.uniform(0.5, 1.5, width))
        self.kernels = {}
        for name, n_out, n_in in (
            ("attn_q", heads * head, width),
            ("attn_k", 2 * head, width),
            ("attn_v", 2 * head, width),
            ("attn_output", width, heads * head),
            ("ffn_gate", width, width),
            ("ffn_up", width, width),
            ("ffn_down", width, width),
        ):
            self.matrix(f"blk.0.{name}.weight", n_out, n_in, kind, rng)

    def matrix(self, name, n_out, n_in, kind, rng):
        length = {"TQ2_0": 256, "TQ1_0": 256, "Q2_0": 64, "Q2_0/128": 128}.get(kind, 32)
        if n_in % length:
            kind, length = "Q8_0", 32
        blocks = n_out * n_in // length
        scale = np.float16(rng.uniform(0.5, 1.5, blocks) * n_in**-0.5).astype(np.float32)
        codes = rng.integers(-1, 2, (blocks, length)).astype(np.int8)
        value = codes * scale[:, None]
        if kind == "Q8_0":
            q = rng.integers(-127, 128, (blocks, length))
            scale = np.float16(scale / 127).astype(np.float32)
            raw, value = q8_0(q, scale), q * scale[:, None]
        elif kind == "Q4_1":
            q = rng.integers(0, 16, (blocks, length))
            scale = np.float16(scale / 8).astype(np.float32)
            least = np.float16(-8 * scale).astype(np.float32)
            raw, value = q4_1(q, scale, least), q * scale[:, None] + least[:, None]
        elif kind in ("F16", "BF16", "F32"):
            wide = rng.normal(size=(blocks, length)).astype(np.float32) * np.float32(n_in**-0.5)
            bits = (wide.view(np.uint32) >> 16).astype("<u2")
            raw = {"F16": wide.astype("<f2"), "BF16": bits, "F32": wide}[kind]
            value = raw.astype(np.float32)
            if kind == "BF16":
                value = (bits.astype(np.uint32) << 16).view(np.float32)
        else:
            make = {"TQ2_0": tq2_0, "TQ1_0": tq1_0, "Q2_0": q2_0}.get(kind)
            raw = make(codes, scale) if make else q2_0(codes, scale, 128)
        self.tensors[name] = (
            kind.split("/")[0],
            (n_out, n_in),
            np.ascontiguousarray(raw).tobytes(),
        )
        self.kernels[name] = value.reshape(n_out, n_in).astype(np.float32)

    def write(self, path):
        return write(path, self.metadata, self.tensors)
