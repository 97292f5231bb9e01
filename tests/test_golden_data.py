"""Tokens, chain-of-thought starts, drawn rows and keyframes equal the released code's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from laser_jax.alignment import keyframe_segments, token_segment_ends
from laser_jax.config import DataConfig, PromptConfig
from laser_jax.data.pipeline import draw_example
from laser_jax.data.schema import TrainingRow
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, right_pad

GOLDEN = Path(os.environ.get("LASER_GOLDEN", Path(__file__).parents[1].parent / "shared/golden"))
COLLATORS = sorted(GOLDEN.glob("collator_*.json"))
# pytest would drop a test without parameters silently enough to be missed.
collators = pytest.mark.parametrize(
    "path",
    COLLATORS or [pytest.param(None, marks=pytest.mark.skip(f"no collator_*.json under {GOLDEN}"))],
    ids=lambda path: path.stem if path else "absent",
)
OFFICIAL: dict[str, Any] = {
    "query_template": "{query}",
    "truncation": "sequence",
    "segmentation": "token",
    "allow_special_tokens": True,
}


def read(path: Path) -> tuple[dict[str, Any], Any]:
    model = path.stem.removeprefix("collator_")
    return json.loads(path.read_text()), load_tokenizer(path.parent / model)


def unpadded(features: dict[str, Any]) -> list[list[int]]:
    return [
        [token for token, real in zip(ids, mask, strict=True) if real]
        for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True)
    ]


@collators
def test_collator_tokens_and_chain_of_thought_starts(path) -> None:
    golden, tokenizer = read(path)
    for case in golden["cases"]:
        args = case["data_args"]
        config = PromptConfig(
            **OFFICIAL,
            chat_template=args["add_chat_template"],
            append_eos=args["append_eos_token"],
            append_eos_to_reasoning=False,
            query_max_length=args["query_max_len"],
            document_max_length=args["passage_max_len"],
        )
        prompts = PromptTokenizer(tokenizer, config)
        features = golden["features"]
        queries = [prompts.query(query, "") for query, _, _ in features]
        documents = [prompts.document(text) for _, passages, _ in features for text in passages]
        explicit = [prompts.explicit(query, "", reasoning) for query, _, reasoning in features]
        assert queries == unpadded(case["query"]), args
        assert documents == unpadded(case["passage"]), args
        assert [tokens.ids for tokens in explicit] == unpadded(case["rewrite"]), args

        multiple = args["pad_to_multiple_of"] or 1
        for name, rows in (("query", queries), ("passage", documents)):
            width = len(case[name]["input_ids"][0])
            assert right_pad(rows, prompts.pad_id, multiple)[0].shape == (len(rows), width)
        padded = len(case["rewrite"]["input_ids"][0])
        starts = [tokens.query_length + padded - len(tokens.ids) for tokens in explicit]
        assert starts == case["cot_start"], args


@collators
def test_long_rewrite_is_cut(path) -> None:
    golden, tokenizer = read(path)
    query, _, reasoning = golden["long_rewrite"]["feature"]
    config = PromptConfig(**OFFICIAL, chat_template=False, append_eos_to_reasoning=False)
    tokens = PromptTokenizer(tokenizer, config).explicit(query, "", reasoning)
    assert [tokens.ids] == unpadded(golden["long_rewrite"]["rewrite"])
    assert len(tokens.ids) == golden["long_rewrite"]["rewrite_len"]


@collators
def test_encode_collator_documents(path) -> None:
    golden, tokenizer = read(path)
    expected = unpadded(golden["encode_collator"])
    # The texts are not recorded: the rows' own tokens, and words that the limit must cut off.
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    longest = max(len(ids) for ids in expected)
    texts = [
        text + " t400 t401" * (len(ids) == longest)
        for text, ids in zip(texts, expected, strict=True)
    ]
    config = PromptConfig(**OFFICIAL, chat_template=False, document_max_length=longest)
    prompts = PromptTokenizer(tokenizer, config)
    rows = [prompts.document(text) for text in texts]
    assert rows == expected
    width = len(golden["encode_collator"]["input_ids"][0])
    assert right_pad(rows, prompts.pad_id, 16)[0].shape == (len(rows), width)


def query_template(prefix: str) -> str:
    """The released code's query prefix as a template of ours."""
    template = prefix.replace("{instruct}", "{instruction}").replace("{}", "{instruction}")
    return template if "{query}" in template else template + "{query}"


@collators
def test_dataset_items(path) -> None:
    golden, tokenizer = read(path)
    columns = golden["dataset"]["rows"]
    rows = [
        TrainingRow(
            query=columns["query"][i],
            reasoning_query=columns["reasoning_query"][i],
            prompt=columns["prompt"][i],
            positive_passages=tuple(columns["positive_passages"][i]),
            negative_passages=tuple(columns["negative_passages"][i]),
        )
        for i in range(len(columns["query"]))
    ]
    for output in golden["dataset"]["outputs"]:
        config = PromptConfig(
            query_template=query_template(output["query_prefix"]),
            document_template=output["passage_prefix"] + "{document}",
            chat_template=False,
        )
        prompts = PromptTokenizer(tokenizer, config)
        items = []
        for index, row in enumerate(rows):
            example = draw_example(
                row,
                DataConfig(group_size=output["train_group_size"]),
                min_reasoning_characters=config.min_reasoning_characters,
                seed=output["seed"],
                epoch=int(output["epoch"]),
                row_index=index,
            )
            query = prompts.query_prompt_text(example.query, example.instruction)
            documents = [prompts.document_prompt_text(text) for text in example.documents]
            items.append([query, documents, example.reasoning])
        assert items == output["items"], output


@collators
def test_text_segments_equal_token_segments_where_nothing_is_cut_or_merged(path) -> None:
    golden, tokenizer = read(path)
    if tokenizer.get_vocab().get("\n\n") is None:
        pytest.skip("the tokenizer has no token for the separator")
    by_text = PromptConfig(query_template="{query}", append_eos_to_reasoning=False)
    by_token = PromptConfig(**OFFICIAL, append_eos_to_reasoning=False)
    text, token = (PromptTokenizer(tokenizer, config) for config in (by_text, by_token))
    for query, _, reasoning in golden["features"]:
        assert text.explicit(query, "", reasoning) == token.explicit(query, "", reasoning)


def test_token_segments_are_as_many_as_in_the_recorded_training_batches() -> None:
    paths = sorted(GOLDEN.glob("train_*.npz"))
    if not paths:
        pytest.skip(f"no train_*.npz under {GOLDEN}")
    for path in paths:
        recorded = np.load(path)
        padding_B = (recorded["r_mask"] == 0).sum(axis=1)
        starts_B = recorded["cot_start"] - padding_B
        counts = [
            len(
                token_segment_ends(ids[mask == 1].tolist(), int(start), int(recorded["newline_id"]))
            )
            for ids, mask, start in zip(
                recorded["r_ids"], recorded["r_mask"], starts_B, strict=True
            )
        ]
        assert counts == recorded["n_segments"].tolist(), path.name


@pytest.mark.skipif(not (GOLDEN / "index_map.json").is_file(), reason=f"no index map in {GOLDEN}")
@pytest.mark.parametrize(("rule", "column"), [("official", "code"), ("paper", "paper1")])
def test_keyframes_equal_the_index_map(rule: Literal["official", "paper"], column: str) -> None:
    table = json.loads((GOLDEN / "index_map.json").read_text())["table"]
    for name, columns in table.items():
        num_segments, K = (int(part[1:]) for part in name.split("_"))
        got = keyframe_segments(num_segments, K, rule).tolist()
        assert got == columns[column], name


@pytest.mark.skipif(not (GOLDEN / "index_map.json").is_file(), reason=f"no index map in {GOLDEN}")
def test_official_keyframes_round_where_torch_rounds() -> None:
    index_map = json.loads((GOLDEN / "index_map.json").read_text())
    expected = index_map["float_rounding_mismatches_K<=32_M<600"]
    mismatches = [
        [num_segments, K]
        for K in range(2, 33)
        for num_segments in range(K, 600)
        if not np.array_equal(
            keyframe_segments(num_segments, K, "official"),
            np.arange(K) * (num_segments - 1) // (K - 1),
        )
    ]
    assert mismatches == expected
