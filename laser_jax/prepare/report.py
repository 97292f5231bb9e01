"""What `laser_jax.prepare` counts over rows, and the report that it makes of the counts."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laser_jax.config import PromptConfig
from laser_jax.data.pipeline import settled_reasoning
from laser_jax.data.reasoning_retrieval import example_of
from laser_jax.data.schema import TrainingRow, same_text
from laser_jax.data.tokenization import PromptTokenizer

_SHOWN = 10
"""Rejected rows that the report names."""


@dataclass
class ShardStats:
    """Counts over rows, which add up over shards. Keys of the inner counters are lengths."""

    rows: int = 0
    written: int = 0
    bytes: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Where, and why."""
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    truncated: Counter[str] = field(default_factory=Counter)
    query_hashes: list[int] = field(default_factory=list)
    row_hashes: list[int] = field(default_factory=list)
    positives_among_own_negatives: int = 0
    sha256: str = ""
    """The checksum of the shard's file."""

    def count(self, what: str, length: int, truncated: bool = False) -> None:
        self.lengths.setdefault(what, Counter())[length] += 1
        self.truncated[what] += truncated

    def count_row(
        self, row: TrainingRow, prompt: PromptConfig, prompts: PromptTokenizer | None
    ) -> None:
        """Counts a row: its tokens where there are `prompts`, its segments, and its duplicates.
        Raises a TokenizationError where the limits of `prompt` leave no room for a text."""
        if prompts is None:
            *closed, tail = row.reasoning_query.split(prompt.separator)
            self.count("segments", len(closed) + bool(tail))
        else:
            reasoning = settled_reasoning(row, prompt.min_reasoning_characters)
            query = prompts.query_prompt(row.query, row.prompt)
            explicit = prompts.explicit(row.query, row.prompt, reasoning)
            texts = (*row.positive_passages, *row.negative_passages)
            passages = [prompts.document_prompt(text) for text in texts]
            self.count("queries", len(query.ids), query.truncated)
            self.count("explicit inputs", len(explicit.ids), explicit.truncated)
            self.count("segments", len(explicit.segment_ends))
            for passage in passages:
                self.count("passages", len(passage.ids), passage.truncated)
        self.query_hashes.append(_hash(same_text(row.query)))
        self.row_hashes.append(_hash(json.dumps(example_of(row, ""))))
        negatives = set(map(same_text, row.negative_passages))
        found = (same_text(text) in negatives for text in row.positive_passages)
        self.positives_among_own_negatives += sum(found)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def stats_of(values: dict[str, Any]) -> ShardStats:
    """The statistics that were written as JSON, whose keys are texts. Raises a ValueError,
    KeyError or TypeError on anything else."""
    stats = ShardStats(**values)
    stats.lengths = {
        what: Counter({int(length): n for length, n in dict(counts).items()})
        for what, counts in dict(stats.lengths).items()
    }
    return stats


def report_of(found: Sequence[ShardStats]) -> dict[str, Any]:
    """What `report.json` holds, of all shards together."""
    lengths: dict[str, Counter[int]] = {}
    truncated: Counter[str] = Counter()
    for stats in found:
        truncated.update(stats.truncated)
        for what, counts in stats.lengths.items():
            lengths.setdefault(what, Counter()).update(counts)
    rejected = [entry for stats in found for entry in stats.rejected]
    reasons = Counter(re.sub(r"\d+", "N", why) for _, why in rejected)
    counted = {what: counts for what, counts in lengths.items() if what != "segments"}
    return {
        "rows": sum(stats.rows for stats in found),
        "written": sum(stats.written for stats in found),
        "shards": len(found),
        "rejected": {
            "rows": len(rejected),
            "reasons": dict(reasons.most_common()),
            "first": [f"{where}: {why}" for where, why in rejected[:_SHOWN]],
        },
        "tokens": {what: _percentiles(counts) for what, counts in counted.items()},
        "truncated": {
            what: round(truncated[what] / counts.total(), 6) for what, counts in counted.items()
        },
        "segments_per_reasoning": _percentiles(lengths["segments"]),
        "duplicates": {
            "queries": _repeated([stats.query_hashes for stats in found]),
            "rows": _repeated([stats.row_hashes for stats in found]),
            "positives_among_own_negatives": sum(t.positives_among_own_negatives for t in found),
        },
    }


def _percentiles(counts: Counter[int]) -> dict[str, int]:
    lengths = np.repeat(list(counts), list(counts.values()))
    ranks = np.percentile(lengths, (50, 90, 99, 100), method="inverted_cdf").astype(int).tolist()
    return dict(zip(("p50", "p90", "p99", "max"), ranks, strict=True))


def _repeated(hashes: Sequence[list[int]]) -> int:
    """How many are equal to one before."""
    joined = np.concatenate([np.array(part, np.uint64) for part in hashes])
    return len(joined) - len(np.unique(joined))


def format_report(report: dict[str, Any]) -> str:
    """The report as the text that the program prints."""
    rejected = report["rejected"]
    lines = [
        f"{report['rows']:,} rows, {report['written']:,} written in {report['shards']} shard(s), "
        f"{rejected['rows']:,} rejected"
    ]
    lines += [f"  {number:,} x {reason}" for reason, number in rejected["reasons"].items()]
    lines += [f"  first: {where}" for where in rejected["first"]]
    lines.append(f"{'':24}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}{'truncated':>11}")
    for what, percentiles in report["tokens"].items():
        lengths = "".join(f"{n:>8,}" for n in percentiles.values())
        lines.append(f"{f'tokens of {what}':24}{lengths}{report['truncated'][what]:>11.2%}")
    lengths = "".join(f"{n:>8,}" for n in report["segments_per_reasoning"].values())
    lines.append(f"{'segments of a reasoning':24}{lengths}")
    if not report["tokens"]:
        lines.append("tokens are not counted without --tokenizer")
    duplicates = report["duplicates"]
    lines.append(
        f"duplicates: {duplicates['queries']:,} queries, {duplicates['rows']:,} rows, "
        f"{duplicates['positives_among_own_negatives']:,} positives among their own negatives"
    )
    return "\n".join(lines)
