"""What it costs to encode a hundred million documents, and a billion.

    python -m benchmarks.corpus_cost [--data BEIR_DIR] [--backbone NAME] [--documents N]

Documents of a BEIR directory are planned and encoded as `python -m laser_jax.encode_corpus` does
it, by a model of random weights, with all programs compiled before. From that come documents a
second on this device and its share of the device's matmul speed, which is measured beside it. What
other models and devices would take is computed: FLOPs a document by formula
(`laser_jax.training.throughput.forward_flops`), divided by the data sheet's peak times an assumed
share of it (`--mfu`). Those rows are estimates, and say so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import (
    Report,
    Spread,
    command_line,
    environment,
    positive,
    ratio_cell,
    time_alternating,
)
from benchmarks.workload import SHAPES, SMALL, TINY, make_backbone, random_variables
from laser_jax.config import (
    BACKBONES,
    BackboneConfig,
    PromptConfig,
    RetrieverConfig,
    as_dict,
    save_retriever_config,
)
from laser_jax.corpus.directory import CorpusDirectory
from laser_jax.corpus.documents import Corpus
from laser_jax.corpus.encoding import CorpusConfig, ShardEncoder, settings_of
from laser_jax.corpus.plan import Plan, Settings
from laser_jax.data.tokenization import train_tokenizer
from laser_jax.evaluation.beir import Document, read_corpus
from laser_jax.hf import save_params
from laser_jax.training.throughput import DATA_SHEETS, Reading, forward_flops

_ESTIMATED = ("A100", "H100", "TPU v5 lite", "TPU v6 lite")
_VOCABULARY = 8_000


def document_flops(backbone: BackboneConfig, tokens: float, pairs: float, steps: int) -> float:
    """Of one document with so many tokens, and pairs of a token and one that it attends to."""
    return forward_flops(backbone, Reading(1, tokens, pairs, selected=1, thoughts=steps - 1))


def write_model(directory: Path, backbone: BackboneConfig, documents: Sequence[Document]) -> None:
    """A model of random weights, with a tokenizer of these documents."""
    directory.mkdir()
    texts = [document.text for document in documents]
    tokenizer = train_tokenizer(texts, min(_VOCABULARY, backbone.vocab_size))
    variables = random_variables(make_backbone(backbone, "float32", None))
    save_params(directory, variables, backbone, dtype=np.float32, lora=None)
    tokenizer.save_pretrained(directory)
    prompt = PromptConfig(chat_template=False)
    save_retriever_config(RetrieverConfig(backbone, num_thinking_steps=3, prompt=prompt), directory)


def write_corpus(path: Path, documents: Sequence[Document], count: int) -> Path:
    """So many documents, the given ones again and again."""
    rows = ({"_id": f"d{n}", "text": documents[n % len(documents)].text} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def timed_plan(path: Path, directory: CorpusDirectory, settings: Settings) -> tuple[Plan, float]:
    """A new plan, and the seconds it took."""
    began = time.perf_counter()
    with Corpus(path) as corpus:
        plan = directory.open_plan(corpus, settings, skipped=lambda: 0, advance=lambda count: None)
    return plan, time.perf_counter() - began


def matmul_speed(size: int, repeats: int) -> list[float]:
    """FLOP/s of a large float32 matmul, a repeat each."""
    a = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(jnp.dot)
    times = time_alternating({"matmul": lambda: multiply(a, a)}, repeats=repeats)["matmul"]
    return [2 * size**3 / seconds for seconds in times]


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Encodes the same shard again and again, after one round that compiles and does not count."""
    name, backbone = options.backbone, SHAPES[options.backbone]
    if options.quick:  # its vocabulary is smaller than any tokenizer's
        name, backbone = TINY, replace(SHAPES[TINY], vocab_size=300)
    documents = read_corpus(options.data)[: 32 if options.quick else options.documents]
    corpus = write_corpus(folder / "corpus.jsonl", documents, len(documents))
    write_model(folder / "model", backbone, documents)
    config = CorpusConfig(
        str(folder / "model"), str(corpus), str(folder / "out"), dtype="float16", devices=1
    )
    settings = settings_of(config)
    directory = CorpusDirectory(config.output)
    plan, _ = timed_plan(corpus, directory, settings)
    count = 100 if options.quick else 20_000
    many = write_corpus(folder / "many.jsonl", documents, count)
    _, planned = timed_plan(many, CorpusDirectory(folder / "many"), settings)
    seconds = []
    with ShardEncoder(config, plan, directory) as encoder:
        lengths = np.array([len(encoder.retriever.prompts.document(d.text)) for d in documents])
        for _ in range(1 + options.repeats):
            began = time.perf_counter()
            encoder.encode(0)
            seconds.append(time.perf_counter() - began)
    flops = document_flops(backbone, lengths.mean(), (lengths * (lengths + 1) / 2).mean(), steps=3)
    size = 256 if options.quick else 4096
    peak = Spread.of(matmul_speed(size, options.repeats)).median
    rates = Spread.of([len(documents) / s for s in seconds[1:]])
    return {
        "model": name,
        "device": jax.devices()[0].device_kind,
        "basis": "measured",
        "tokens": float(lengths.mean()),
        "flops": flops,
        "documents_per_second": vars(rates),
        "share_of_peak": rates.median * flops / peak,
        "matmul_flops_per_second": peak,
        "planned_per_second": count / planned,
    }


def estimated(options: argparse.Namespace, tokens: float) -> list[dict[str, Any]]:
    """What the formula gives for documents of `tokens` tokens each."""
    sheets = {sheet.kind: sheet.tflops * 1e12 for sheet in DATA_SHEETS}
    rows = []
    for model, backbone in BACKBONES.items():
        flops = document_flops(backbone, tokens, tokens * (tokens + 1) / 2, steps=3)
        for device in _ESTIMATED:
            rate = options.mfu * sheets[device] / flops
            rows.append(
                {
                    "model": model,
                    "device": device,
                    "basis": "estimate",
                    "tokens": tokens,
                    "flops": flops,
                    "documents_per_second": vars(Spread.of([rate])),
                    "share_of_peak": options.mfu,
                }
            )
    return rows


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Measures one row and estimates the others."""
    settings = {"mfu": options.mfu, "estimated_on": _ESTIMATED, "thinking_steps": 3}
    settings["backbone"] = as_dict(SHAPES[TINY if options.quick else options.backbone])
    report = Report("corpus_cost", arguments, settings, environment())
    with tempfile.TemporaryDirectory() as folder:
        row = measured(options, Path(folder))
    report.rows = [row, *estimated(options, options.tokens)]
    report.notes = [
        f"Estimates assume {options.mfu:.0%} of the data sheet's bfloat16 peak and documents of "
        f"{options.tokens} tokens. The measured share is that of a float32 matmul on the same "
        f"device, {row['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s. The plan was made at "
        f"{row['planned_per_second']:,.0f} documents/s."
    ]
    return report


def _hours(row: dict[str, Any], documents: float) -> str:
    return f"{documents / row['documents_per_second']['median'] / 3600:,.0f}"


COLUMNS = {
    "model": lambda row: row["model"],
    "device": lambda row: row["device"],
    "basis": lambda row: row["basis"],
    "share of peak": lambda row: f"{row['share_of_peak']:.0%}",
    "tokens": lambda row: f"{row['tokens']:.0f}",
    "GFLOP a document": lambda row: f"{row['flops'] / 1e9:,.0f}",
    "documents/s": lambda row: (
        ratio_cell(row["documents_per_second"])
        if row["basis"] == "measured"
        else f"{row['documents_per_second']['median']:,.0f}"
    ),
    "10^8: device hours": lambda row: _hours(row, 1e8),
    "10^9: device hours": lambda row: _hours(row, 1e9),
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("corpus_cost", __doc__, repeats=3)
    parser.add_argument("--data", default="../shared/data/scifact", help="a BEIR directory")
    parser.add_argument("--backbone", choices=SHAPES, default=SMALL, help=f"default {SMALL}")
    parser.add_argument("--documents", type=positive, default=512, help="default 512")
    parser.add_argument("--tokens", type=positive, default=256, help="of an estimated document")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak")
    options = parser.parse_args(arguments)
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
