"""The paper's latency figure: a query as a standard retriever reads it, with K latent thinking
steps, and rewritten first.

    python -m benchmarks.rewrite_latency [--backbone NAME] [--batches 1 8] [--new_tokens 300]

The three methods have one backbone and are timed in turn. The standard retriever embeds the query
(K = 1); the latent view embeds it with K steps; rewrite-then-retrieve reads the query in the
rewriting prompt, writes `--new_tokens` tokens with a key-value cache (laser_jax.generation), and
embeds the query with what was written. Weights are random, so no row ends early: every method does
all of its work. All of it is ours, so a ratio says what the method costs and not who wrote it.

`--measured_tokens` writes fewer tokens, with the cache of all of them, and scales the time of
writing, token by token; a note says so.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import (
    Report,
    Run,
    Spread,
    command_line,
    environment,
    paired_ratio,
    positive,
    ratio_cell,
    seconds_cell,
    time_alternating,
    timing_fields,
)
from benchmarks.workload import (
    SHAPES,
    TINY,
    add_backbone,
    make_backbone,
    random_tokens,
    random_variables,
)
from laser_jax import encode
from laser_jax.config import BackboneConfig, Dtype, RetrieverConfig, as_dict
from laser_jax.generation import Decoding, TextGenerator, Written
from laser_jax.modeling.backbone import Variables, unstack_layers

STANDARD, REWRITE = "standard retriever", "rewrite-then-retrieve"
PROMPT_TOKENS = 96
"""What `laser_jax.rewrite` puts around a query: the reasoning prompt and the chat template."""
PAPER_OVER_STANDARD, PAPER_OF_REWRITE = 1.7, 0.003
"""arXiv 2603.01425 of the latent view at K = 3: about 1.7 times a standard retriever, and 0.3 % of
rewrite-then-retrieve."""


class Methods:
    """The three methods over one backbone with random weights."""

    def __init__(self, backbone: BackboneConfig, options: argparse.Namespace):
        dtype: Dtype = options.dtype
        self._config = RetrieverConfig(backbone, dtype=dtype)
        scanned = random_variables(make_backbone(backbone, dtype, lora=None))
        self._variables: Variables = unstack_layers(scanned)
        self._options = options
        self._encode = {
            K: jax.jit(functools.partial(encode, config=self._config, num_thinking_steps=K))
            for K in {1, options.thinking_steps}
        }
        self.written: list[Written] = []
        """Of every call of rewrite-then-retrieve, the first row."""

    def _embed(self, ids_BT: np.ndarray, K: int) -> jax.Array:
        return self._encode[K](self._variables, ids_BT, np.ones_like(ids_BT))

    def on(self, rows: int) -> dict[str, Run]:
        """The methods on one batch of queries, by name; each call gives its vectors."""
        options, rng = self._options, np.random.default_rng(0)
        backbone = self._config.backbone
        generator = TextGenerator(
            self._variables,
            backbone,
            Decoding(options.new_tokens),
            stop_ids=(),
            dtype=jnp.dtype(self._config.dtype),
            batch_size=rows,
            batch_tokens=2**30,
        )
        query_BT, around_BT, longer_BT = (
            random_tokens(rng, rows, width, backbone.vocab_size).ids_BT
            for width in (
                options.query_tokens,
                options.prompt_tokens,
                options.query_tokens + options.new_tokens + 1,  # and EOS
            )
        )
        prompts = np.concatenate([query_BT, around_BT], axis=1).tolist()

        def rewrite_then_retrieve() -> Any:
            texts = generator.write(prompts, max_new_tokens=options.measured_tokens)
            self.written.append(texts[0])
            # the longer query has its whole length, also where fewer tokens were written
            start = options.query_tokens
            longer_BT[:, start : start + options.measured_tokens] = [text.ids for text in texts]
            return self._embed(longer_BT, 1)

        return {
            STANDARD: lambda: self._embed(query_BT, 1),
            latent(options.thinking_steps): lambda: self._embed(query_BT, options.thinking_steps),
            REWRITE: rewrite_then_retrieve,
        }


def latent(steps: int) -> str:
    """The name of our method."""
    return f"latent, K = {steps}"


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Times the methods on every batch size."""
    if options.quick:
        options.batches, options.query_tokens, options.prompt_tokens = [1, 2], 8, 8
        options.new_tokens, options.measured_tokens = 6, options.measured_tokens or 4
    if options.measured_tokens is None:
        options.measured_tokens = options.new_tokens
    backbone = SHAPES[TINY if options.quick else options.backbone]
    settings = {
        "backbone": as_dict(backbone),
        **{
            name: getattr(options, name)
            for name in (
                *("dtype", "repeats", "batches", "thinking_steps"),
                *("query_tokens", "prompt_tokens", "new_tokens", "measured_tokens"),
            )
        },
    }
    report = Report("rewrite_latency", arguments, settings, environment())
    methods = Methods(backbone, options)
    for rows in options.batches:
        contenders = methods.on(rows)
        methods.written.clear()
        times = time_alternating(contenders, repeats=options.repeats)
        written = methods.written[-options.repeats :]
        times[REWRITE] = [
            seconds + text.decode_seconds * (_scale(options) - 1)
            for seconds, text in zip(times[REWRITE], written, strict=True)
        ]
        for name in contenders:
            row = {"method": name, "rows": rows} | timing_fields(times, name, base=STANDARD)
            row["of_rewrite"] = vars(paired_ratio(times[name], times[REWRITE]))
            if name == REWRITE:
                decode = [text.decode_seconds * _scale(options) for text in written]
                row["prefill_seconds"] = vars(Spread.of([t.prefill_seconds for t in written]))
                row["decode_seconds"] = vars(Spread.of(decode))
                row["tokens_per_second"] = rows * (options.new_tokens - 1) / np.median(decode)
            report.rows.append(row)
    report.notes.append(
        f"Queries of {options.query_tokens} tokens; the rewriting prompt has "
        f"{options.prompt_tokens} more, and {options.new_tokens} are written. The paper's figures "
        f"(arXiv 2603.01425) for K = 3: {PAPER_OVER_STANDARD} × a standard retriever, "
        f"{100 * PAPER_OF_REWRITE:g} % of rewrite-then-retrieve, which makes the latter "
        f"{PAPER_OVER_STANDARD / PAPER_OF_REWRITE:.0f} × the first."
    )
    if options.measured_tokens < options.new_tokens:
        report.notes.append(
            f"Only {options.measured_tokens} of the {options.new_tokens} tokens were written; the "
            f"time from the first token to the last is scaled by {_scale(options):.3f}."
        )
    return report


def _scale(options: argparse.Namespace) -> float:
    """What the time of decoding is multiplied with: the first token is prefill's."""
    return (options.new_tokens - 1) / (options.measured_tokens - 1)


def _paper(row: dict[str, Any]) -> str:
    if row["method"].startswith("latent"):
        return f"{PAPER_OVER_STANDARD} ×, {100 * PAPER_OF_REWRITE:g} %"
    if row["method"] == REWRITE:
        return f"{PAPER_OVER_STANDARD / PAPER_OF_REWRITE:.0f} ×, 100 %"
    return f"1 ×, {100 * PAPER_OF_REWRITE / PAPER_OVER_STANDARD:.2f} %"


COLUMNS = {
    "method": lambda row: row["method"],
    "batch": lambda row: str(row["rows"]),
    "time (quartiles)": lambda row: seconds_cell(row["seconds"]),
    "prefill": lambda row: seconds_cell(row.get("prefill_seconds")),
    "decode": lambda row: seconds_cell(row.get("decode_seconds")),
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}" if row["method"] == REWRITE else "",
    "× standard (quartiles)": lambda row: ratio_cell(row["ratio"]),
    "% of rewrite": lambda row: f"{100 * row['of_rewrite']['median']:.2f}",
    "paper, K = 3": _paper,
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("rewrite_latency", __doc__, repeats=5)
    add_backbone(parser)
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 8], help="default 1 8")
    for name, value, what in (
        ("thinking_steps", 3, "K of the latent view"),
        ("query_tokens", 128, "tokens of a query"),
        ("prompt_tokens", PROMPT_TOKENS, "tokens of the rewriting prompt around it"),
        ("new_tokens", 300, "tokens of a rewrite"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=value, help=f"{what}; {value}")
    parser.add_argument(
        "--measured_tokens", type=positive, help="write so many and scale; default all of them"
    )
    options = parser.parse_args(arguments)
    measured = options.measured_tokens
    if options.new_tokens < 2 or (measured and not 2 <= measured <= options.new_tokens):
        parser.error("--new_tokens and --measured_tokens: at least 2, and not more measured")
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
