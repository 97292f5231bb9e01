"""Written text against transformers, against full recomputation, and against its own batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser_jax.config import BackboneConfig, ConfigError, ScratchConfig
from laser_jax.data.tokenization import train_tokenizer
from laser_jax.hf.directory import HFError, read_backbone_config
from laser_jax.hf.reading import load_params
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.rewrite.generation import Decoding, TextGenerator, choose_tokens, stop_ids

V = 61
CONFIG = ScratchConfig(
    hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24
).backbone(V)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, V, length).tolist() for length in (7, 1, 12, 30, 3)]
# more than two blocks of the cache, and no multiple of one
LONG = 75


@pytest.fixture(scope="module")
def variables() -> Variables:
    """Weights large enough that a text does not repeat itself at once."""
    drawn = jax.jit(Backbone(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(lambda a: a * 2, nn.meta.unbox(drawn))


def generator(
    variables: Variables, decoding: Decoding, stops: Sequence[int] = (), batch_size: int = 4
) -> TextGenerator:
    return TextGenerator(variables, CONFIG, decoding, stops, batch_size=batch_size)


@pytest.fixture(scope="module")
def greedy(variables: Variables) -> TextGenerator:
    return generator(variables, Decoding(LONG))


@pytest.fixture(scope="module")
def texts(greedy: TextGenerator) -> list[list[int]]:
    return [written.ids for written in greedy.write(PROMPTS)]


# --- greedy ------------------------------------------------------------------------------------


def test_every_token_is_the_likeliest_after_all_before_it(
    variables: Variables, texts: list[list[int]]
) -> None:
    """The whole text is read again at once, without a cache."""
    forward = jax.jit(Backbone(CONFIG).apply)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert len(text) == LONG
        assert len(set(text)) > 5, "a text this monotonous would hide a mistake"
        row = np.zeros((1, 128), np.int32)
        row[0, : len(prompt) + LONG] = [*prompt, *text]
        likeliest = np.asarray(forward(variables, row)[0].argmax(-1))
        start = len(prompt) - 1
        assert likeliest[start : start + LONG].tolist() == text


SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "qwen3", "tie_word_embeddings": True},
        {"model_type": "llama", "tie_word_embeddings": False, "rope_parameters": LLAMA3},
    ],
    ids=["qwen3", "llama3"],
)
def test_transformers_writes_the_same_tokens(tmp_path: Path, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="pip install laser-jax[parity]")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**(SIZES | settings))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        norm = parameter.ndim == 1
        torch.nn.init.normal_(parameter, mean=float(norm), std=0.3)
    model.save_pretrained(tmp_path)

    backbone = read_backbone_config(tmp_path)
    ours = {"params": load_params(tmp_path, backbone, dtype=np.float32)}
    writer = TextGenerator(ours, backbone, Decoding(40), (), batch_size=4)
    texts = writer.write(PROMPTS[:4])
    assert len({token for written in texts for token in written.ids}) > 15
    for prompt, written in zip(PROMPTS[:4], texts, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )
        assert written.ids == wanted[0, len(prompt) :].tolist()


def test_scanned_layers_write_the_same_tokens(
    variables: Variables, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laser_jax.rewrite.generation.for_inference", jax.device_put)  # as on TPU
    scanned = generator(variables, Decoding(40))
    assert [w.ids for w in scanned.write(PROMPTS[:1])] == [texts[0][:40]]


def test_bfloat16_weights_write_too(variables: Variables) -> None:
    half: Any = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
    writer = TextGenerator(half, CONFIG, Decoding(4), (), dtype=jnp.bfloat16)
    assert len(writer.write([PROMPTS[0]])[0].ids) == 4


# --- stopping ----------------------------------------------------------------------------------


def test_a_row_ends_before_its_first_stop_token_and_the_others_go_on(
    variables: Variables, texts: list[list[int]]
) -> None:
    stops = (texts[0][9], texts[2][40])
    writer = generator(variables, Decoding(LONG), stops)
    written = writer.write(PROMPTS[:4])
    ends = [next((i for i, t in enumerate(text) if t in stops), LONG) for text in texts[:4]]
    assert len({*ends}) > 1
    assert [w.ids for w in written] == [t[:end] for t, end in zip(texts, ends, strict=False)]
    assert [w.finished for w in written] == [end < LONG for end in ends]


def test_a_first_token_that_stops_leaves_an_empty_text(
    variables: Variables, texts: list[list[int]]
) -> None:
    writer = generator(variables, Decoding(8), (texts[0][0],))
    written = writer.write([PROMPTS[0]])[0]
    assert (written.ids, written.finished) == ([], True)


def test_a_lower_limit_cuts_the_same_text(variables: Variables, texts: list[list[int]]) -> None:
    for limit in (1, 33):
        written = generator(variables, Decoding(limit)).write(PROMPTS)
        assert [w.ids for w in written] == [text[:limit] for text in texts]
        assert not any(w.finished for w in written)


def test_stop_tokens_are_those_of_all_three_files(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a text"], 270)
    own: Any = tokenizer.eos_token_id
    assert stop_ids(tmp_path, tokenizer) == (own,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8]}))
    assert stop_ids(tmp_path, tokenizer) == tuple(sorted({7, 8, 9, own}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert stop_ids(tmp_path, tokenizer) == tuple(sorted({8, 9, own}))
    for bad in ('{"eos_token_id": "8"}', '{"eos_token_id": [true]}', "[]", "{"):
        (tmp_path / "generation_config.json").write_text(bad)
        with pytest.raises(HFError, match=r"generation_config\.json"):
            stop_ids(tmp_path, tokenizer)


# --- drawing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_tokens_are_drawn_as_often_as_they_should_be(temperature: float) -> None:
    draws = 20_000
    logits = np.random.default_rng(3).normal(size=12) * 1.5
    p = np.exp(logits / temperature)
    p /= p.sum()

    keys = jax.random.split(jax.random.key(0), draws)
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1))
    tokens = choose_tokens(rows, keys, Decoding(temperature=temperature))
    drawn = np.bincount(tokens, minlength=12) / draws
    np.testing.assert_allclose(drawn, p, atol=4 * 0.5 / draws**0.5)


@pytest.fixture(scope="module")
def drawing(variables: Variables) -> TextGenerator:
    return generator(variables, Decoding(40, temperature=1.5))


def test_a_drawn_text_depends_on_its_prompt_and_seed_alone(
    variables: Variables, drawing: TextGenerator
) -> None:
    seeds = [5, 6, 7, 2**32 - 1, 5]
    together = [w.ids for w in drawing.write(PROMPTS, seeds)]
    assert [w.ids for w in drawing.write(PROMPTS, seeds)] == together
    for place in (0, 3):  # alone: another batch, of another shape
        alone = drawing.write([PROMPTS[place]], [seeds[place]])
        assert [w.ids for w in alone] == [together[place]]
    backwards = drawing.write(PROMPTS[::-1], seeds[::-1])
    assert [w.ids for w in backwards] == together[::-1]


def test_other_seeds_and_places_give_other_texts(drawing: TextGenerator) -> None:
    same_prompt = [PROMPTS[2]] * 4
    drawn = [tuple(w.ids) for w in drawing.write(same_prompt, [1, 2, 3, 1])]
    assert len({*drawn}) == 3
    assert drawn[0] == drawn[3]
    assert len({tuple(w.ids) for w in drawing.write(same_prompt)}) == 4  # seeded by their places


# --- batches -----------------------------------------------------------------------------------


def test_greedy_text_is_the_same_alone_and_in_a_batch(
    greedy: TextGenerator, texts: list[list[int]]
) -> None:
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert greedy.write([prompt])[0].ids == text


def test_nothing_is_compiled_after_warm_up(variables: Variables, compilations: Any) -> None:
    writer = generator(variables, Decoding(4, temperature=1.0))
    writer.warm_up(PROMPTS)
    prompts = [prompt[::-1] for prompt in PROMPTS]
    with compilations() as compiled:
        written = writer.write(prompts, range(5, 10))
    assert compiled == []
    assert [len(w.ids) for w in written] == [4] * 5


def test_every_row_knows_its_batch_and_times(greedy: TextGenerator) -> None:
    batches = list(greedy.write_batches(PROMPTS))
    assert sorted(place for batch in batches for place, _ in batch) == [0, 1, 2, 3, 4]
    for batch in batches:
        assert {w.rows for _, w in batch} == {len(batch)}
        assert len({(w.prefill_seconds, w.decode_seconds) for _, w in batch}) == 1
        assert min(batch[0][1].prefill_seconds, batch[0][1].decode_seconds) > 0


def test_no_prompts_give_no_texts(greedy: TextGenerator) -> None:
    assert greedy.write([]) == []


# --- bad input ---------------------------------------------------------------------------------


def test_prompts_and_limits_that_cannot_be_are_refused(variables: Variables) -> None:
    config = BackboneConfig(**{**vars(CONFIG), "max_position_embeddings": 20})
    writer = TextGenerator(variables, config, Decoding(10), ())
    with pytest.raises(ValueError, match=r"prompt 1 of 11 tokens .* take 21 positions, .* has 20"):
        writer.write([[1], [1] * 11])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        writer.write([[]])
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        writer.write([[1], [2]], [0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
    ],
)
def test_decoding_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoding(**settings)
