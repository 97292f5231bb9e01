"""The paper's latency figure: a query as a standard retriever reads it, with K latent thinking
steps, and rewritten first.

    python -m benchmarks.rewrite_latency [--backbone NAME] [--batches 1 8] [--new_tokens 300]

The three methods have one backbone and are timed in turn. The standard retriever embeds the query
(K = 1); the latent view embeds it with K steps; rewrite-then-retrieve reads the query in the
rewriting prompt, writes `--new_tokens` tokens (laser_jax.rewrite.generation, cached), and
embeds the query with what was written. Weights are random, so no row ends early: every method does
all of its work. All of it is ours, so a ratio says what the method costs and not who wrote it.

`--measured_tokens` writes fewer tokens, with the cache of all of them, and scales the time of
writing, token by token; a note says so.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, workload
from benchmarks.measure import BenchmarkError, Report, Row, Run, Spread, positive, timing_fields
from laser_jax import encode
from laser_jax.config import RetrieverConfig
from laser_jax.modeling.backbone import unstack_layers
from laser_jax.rewrite.generation import Decoding, TextGenerator, Written

STANDARD, REWRITE = "standard retriever", "rewrite-then-retrieve"
PROMPT_TOKENS = 96
"""What `laser_jax.rewrite` puts around a query: the reasoning prompt and the chat template."""
PAPER_OVER_STANDARD, PAPER_OF_REWRITE = 1.7, 0.003
"""arXiv 2603.01425 of the latent view at K = 3: about 1.7 times a standard retriever, and 0.3 % of
rewrite-then-retrieve."""


class Methods:
    """The three methods over one backbone with random weights."""

    def __init__(self, options: argparse.Namespace):
        backbone = workload.SHAPES[options.backbone]
        self._config = RetrieverConfig(backbone, dtype=options.dtype)
        scanned = workload.random_variables(
            workload.make_backbone(backbone, options.dtype, lora=None)
        )
        self._variables, self._options = unstack_layers(scanned), options
        self._encode = {
            K: jax.jit(functools.partial(encode, config=self._config, num_thinking_steps=K))
            for K in {1, options.num_thinking_steps}
        }
        self.written: list[Written] = []
        """Of every call of rewrite-then-retrieve, the first row."""

    def _embed(self, ids_BT: np.ndarray, K: int) -> jax.Array:
        return self._encode[K](self._variables, ids_BT, np.ones_like(ids_BT))

    def on(self, rows: int) -> dict[str, Run]:
        """The methods on one batch of queries, by name; each call gives its vectors."""
        options, rng = self._options, np.random.default_rng(0)
        backbone, start = self._config.backbone, options.query_tokens
        generator = TextGenerator(
            self._variables,
            backbone,
            Decoding(options.new_tokens),
            stop_ids=(),
            dtype=jnp.dtype(self._config.dtype),
            batch_size=rows,
            batch_tokens=2**30,
        )
        widths = (start, options.prompt_tokens, start + options.new_tokens + 1)  # and EOS
        query_BT, around_BT, longer_BT = (
            workload.random_tokens(rng, rows, width, backbone.vocab_size).ids_BT for width in widths
        )
        prompts = np.concatenate([query_BT, around_BT], axis=1).tolist()
        measured = options.measured_tokens or options.new_tokens

        def rewrite_then_retrieve() -> Any:
            texts = generator.write(prompts, max_new_tokens=measured)
            self.written.append(texts[0])
            # the longer query has its whole length, also where fewer tokens were written
            longer_BT[:, start : start + measured] = [text.ids for text in texts]
            return self._embed(longer_BT, 1)

        K = options.num_thinking_steps
        return {
            STANDARD: lambda: self._embed(query_BT, 1),
            f"latent, K = {K}": lambda: self._embed(query_BT, K),
            REWRITE: rewrite_then_retrieve,
        }


def fill(options: argparse.Namespace, report: Report) -> None:
    """Times the methods on every batch size."""
    new, measured = options.new_tokens, options.measured_tokens or options.new_tokens
    if not 2 <= measured <= new:
        raise BenchmarkError("--new_tokens and --measured_tokens: at least 2, not more measured")
    scale = (new - 1) / (measured - 1)  # the first token is prefill's
    methods = Methods(options)
    for rows in options.batches:
        contenders = methods.on(rows)
        times = measure.time_alternating(contenders, repeats=options.repeats)
        written = methods.written[-options.repeats :]
        times[REWRITE] = [
            seconds + text.decode_seconds * (scale - 1)
            for seconds, text in zip(times[REWRITE], written, strict=True)
        ]
        for name in contenders:
            row: Row = {"method": name, "rows": rows} | timing_fields(times, name, base=STANDARD)
            row["of_rewrite"] = vars(measure.paired_ratio(times[name], times[REWRITE]))
            if name == REWRITE:
                decode = [text.decode_seconds * scale for text in written]
                row["prefill_seconds"] = vars(Spread.of([t.prefill_seconds for t in written]))
                row["decode_seconds"] = vars(Spread.of(decode))
                row["tokens_per_second"] = rows * (new - 1) / np.median(decode)
            report.rows.append(row)
    report.notes.append(
        f"Queries of {options.query_tokens} tokens; the rewriting prompt has "
        f"{options.prompt_tokens} more, and {new} are written. The paper's figures "
        f"(arXiv 2603.01425) for K = 3: {PAPER_OVER_STANDARD} × a standard retriever, "
        f"{100 * PAPER_OF_REWRITE:g} % of rewrite-then-retrieve."
    )
    if measured < new:
        report.notes.append(
            f"Only {measured} of the {new} tokens were written; the time from the first token to "
            f"the last is scaled by {scale:.3f}."
        )


COLUMNS = {
    "method": measure.value("method"),
    "batch": measure.value("rows"),
    "time (quartiles)": measure.seconds(),
    "prefill": measure.seconds("prefill_seconds"),
    "decode": measure.seconds("decode_seconds"),
    "tokens/s": measure.value("tokens_per_second", ".0f"),
    "× standard (quartiles)": measure.ratio(),
    "% of rewrite": measure.value("of_rewrite", ".2f", 0.01),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    workload.add_backbone(parser)
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 8], help="default 1 8")
    numbers = {
        "num_thinking_steps": (3, "K of the latent view"),
        "query_tokens": (128, "tokens of a query"),
        "prompt_tokens": (PROMPT_TOKENS, "tokens of the rewriting prompt around it"),
        "new_tokens": (300, "tokens of a rewrite"),
    }
    measure.add_numbers(parser, numbers)
    text = "write so many and scale; default all of them"
    parser.add_argument("--measured_tokens", type=positive, help=text)


QUICK = {"backbone": workload.TINY, "batches": [2], "query_tokens": 8, "prompt_tokens": 8}
QUICK |= {"new_tokens": 6, "measured_tokens": 4}
PROGRAM = measure.Program("rewrite_latency", __doc__, fill, COLUMNS, add_flags, QUICK, repeats=5)

if __name__ == "__main__":
    PROGRAM.main(sys.argv[1:])
