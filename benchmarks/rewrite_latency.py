"""The paper's latency figure: a query as a standard retriever reads it, with K latent thinking
steps, and rewritten first.

    python -m benchmarks.rewrite_latency [--backbone NAME] [--batches 1 8] [--new_tokens 300]

The three methods have one backbone and are timed in turn. The standard retriever embeds the query
(K = 1); the latent view embeds it with K steps; rewrite-then-retrieve reads the query in the
rewriting prompt, writes `--new_tokens` tokens (laser_jax.rewrite.generation, cached), and
embeds the query with what was written. Weights are random, so no row ends early: every method does
all of its work. All of it is ours, so a ratio says what the method costs and not who wrote it.
"""

from __future__ import annotations

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, workload
from benchmarks.encoders import Encoders
from benchmarks.measure import BenchmarkError, Report, Row, Run, Spread, positive, timing_fields
from laser_jax.rewrite.generation import Decoding, TextGenerator, Written

STANDARD, REWRITE = "standard retriever", "rewrite-then-retrieve"


def methods_on(
    rows: int, encoders: Encoders, options: argparse.Namespace, written: list[Written]
) -> dict[str, Run]:
    """The methods on one batch of queries, by name; each call gives its vectors.

    Args:
        written: is given the first row of every call of rewrite-then-retrieve.
    """
    rng, vocab_size = np.random.default_rng(0), encoders.config.backbone.vocab_size
    generator = TextGenerator(
        encoders.variables,
        encoders.config.backbone,
        Decoding(options.new_tokens),
        stop_ids=(),
        dtype=jnp.dtype(options.dtype),
        batch_size=rows,
        batch_tokens=2**30,
    )
    start, K = options.query_tokens, options.num_thinking_steps
    widths = (start, options.prompt_tokens, start + options.new_tokens + 1)  # and EOS
    query, around, longer = (
        workload.random_tokens(rng, rows, width, vocab_size) for width in widths
    )
    prompts = np.concatenate([query.ids_BT, around.ids_BT], axis=1).tolist()

    def rewrite_then_retrieve() -> jax.Array:
        texts = generator.write(prompts)
        written.append(texts[0])
        longer.ids_BT[:, start:-1] = [text.ids for text in texts]
        return encoders.ours(longer, 1)()

    return {
        STANDARD: encoders.ours(query, 1),
        f"latent, K = {K}": encoders.ours(query, K),
        REWRITE: rewrite_then_retrieve,
    }


def fill(options: argparse.Namespace, report: Report) -> None:
    """Times the methods on every batch size.

    Raises:
        BenchmarkError: nothing is decoded.
    """
    if options.new_tokens < 2:
        raise BenchmarkError("--new_tokens: at least 2 are wanted, as the first is prefill's")
    encoders = Encoders(options, torch=())
    for rows in options.batches:
        written: list[Written] = []
        contenders = methods_on(rows, encoders, options, written)
        times = measure.time_alternating(contenders, repeats=options.repeats)
        written = written[-options.repeats :]  # one call was not timed
        for name in contenders:
            row: Row = {"method": name, "rows": rows} | timing_fields(times, name, base=STANDARD)
            row["of_rewrite"] = vars(measure.paired_ratio(times[name], times[REWRITE]))
            if name == REWRITE:
                decode = Spread.of([text.decode_seconds for text in written])
                row["prefill_seconds"] = vars(Spread.of([t.prefill_seconds for t in written]))
                row["decode_seconds"] = vars(decode)
                row["tokens_per_second"] = rows * (options.new_tokens - 1) / decode.median
            report.rows.append(row)
    report.notes.append(
        f"Queries of {options.query_tokens} tokens; the rewriting prompt has "
        f"{options.prompt_tokens} more, and {options.new_tokens} are written."
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
        "prompt_tokens": (96, "tokens that `laser_jax.rewrite` puts around it"),
        "new_tokens": (300, "tokens of a rewrite"),
    }
    measure.add_numbers(parser, numbers)


QUICK = {"backbone": workload.TINY, "batches": [2], "query_tokens": 8, "prompt_tokens": 8}
QUICK |= {"new_tokens": 6}
PROGRAM = measure.Program("rewrite_latency", __doc__, fill, COLUMNS, add_flags, QUICK, repeats=5)

if __name__ == "__main__":
    PROGRAM.main(sys.argv[1:])
