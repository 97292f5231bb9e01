"""Rewrites queries with a language model: the first half of rewrite-then-retrieve.

    python -m laser_jax.rewrite --model DIR --input BEIR_DIR|queries.jsonl --output rewrites.jsonl

`python -m laser_jax.evaluate model --rewrites rewrites.jsonl` is the second half. Each batch of
rewrites is on the disk before the next begins; the same command completes a file that was cut
short.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from laser_jax.command_line import program
from laser_jax.config import BackboneConfig, Dtype, PromptConfig
from laser_jax.data.documents import EvalQuery
from laser_jax.data.tokenization import PromptTokenizer, Tokenizer, load_tokenizer_for
from laser_jax.evaluate.beir import read_qrels, read_queries
from laser_jax.evaluate.results import markdown_table
from laser_jax.evaluate.retrieval import require_instructions
from laser_jax.evaluate.rewrites import Rewrite, WritingCost, milliseconds_per_query, read_rewrites
from laser_jax.files.claim import Claim, OutputError
from laser_jax.files.durable import json_text
from laser_jax.files.reading import DataError
from laser_jax.hf.directory import read_backbone_config
from laser_jax.hf.reading import load_params
from laser_jax.inference.options import BatchOptions
from laser_jax.models.directory import model_directory
from laser_jax.rewrite.generation import Decoding, TextGenerator, Written, stop_ids
from laser_jax.settings import Change, changes, require
from laser_jax.train.checkpoint import fingerprint

REASONING_PROMPT = """{query}

Find out what a document would have to say to answer the text above.
1. Name the problem that it is really about.
2. Reason step by step: which facts, concepts or methods would help to solve it? Explain each of \
them in detail.
3. Draft an answer, and put into it whatever you can think of."""
"""The demands of the prompt with which BRIGHT (arXiv 2407.12883) has its queries reasoned about, in
our words: the essential problem, helpful information step by step, a draft of the answer."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RewriteOptions(BatchOptions, Decoding):
    """Writes a reasoning for every query with a language model (a Hugging Face directory, with its
    tokenizer, of any family of `BackboneConfig`) into a file that evaluate reads."""

    input: str
    """A BEIR directory, or a queries.jsonl."""
    output: str
    """The file to write, a JSON line a query; what it holds already is not written again. Beside it
    stands NAME.report.json with the settings and times."""
    split: str | None = None
    """Only the queries that this split of the BEIR directory judges."""
    prompt: str = REASONING_PROMPT
    """What the model is told; {query} stands for the query, {instruction} for its instruction."""
    chat_template: bool = True
    """Put the prompt as a user's turn in the tokenizer's chat template; false for base models."""
    thinking_suffix: str | None = None
    """Begins the model's turn. None: an empty thought if the tokenizer knows <think>, so that the
    rewrite comes at once, otherwise nothing."""
    max_length: int | None = 2048
    """Tokens of a prompt, whose query is shortened where it does not fit. None: what the model's
    positions leave room for."""
    seed: int = 0
    """Draws the tokens, together with the query's id: not with its place or its company."""
    compute_dtype: Dtype = "float32"
    """The dtype of weights and computation: float32 is fastest on CPU, bfloat16 on GPU and TPU."""
    batch_size: int = 8
    length_multiple: int = 128

    def __post_init__(self) -> None:
        BatchOptions.__post_init__(self)
        Decoding.__post_init__(self)
        require("{query}" in self.prompt, f"prompt {self.prompt!r} has no {{query}} placeholder")
        fault = "a seed is of use only with a temperature above 0"
        require(self.temperature > 0 or self.seed == 0, fault)


def read_wanted(options: RewriteOptions) -> dict[str, EvalQuery]:
    """The queries to rewrite, with their instructions where the prompt has a place for one. Raises
    as `evaluate.beir`, and a ConfigError where options and queries do not go together."""
    queries = read_queries(options.input)
    if options.split is not None:
        fault = f"--split wants a BEIR directory, and {options.input} is none"
        require(Path(options.input).is_dir(), fault)
        judged = read_qrels(options.input, options.split)
        queries = {id_: query for id_, query in queries.items() if id_ in judged}
    if not queries:
        raise DataError(f"{options.input}: holds no query to rewrite")
    require_instructions(queries.values(), options.prompt)
    return queries


def prompt_maker(
    options: RewriteOptions, tokenizer: Tokenizer, backbone: BackboneConfig
) -> PromptTokenizer:
    """Makes the rewriter's prompts, no longer than the model's positions leave room for. Raises a
    ConfigError where they leave none or there is no chat template, and a TokenizationError."""
    written = options.max_new_tokens
    what = f"max_new_tokens {written} and a prompt of a token take"
    backbone.require_positions(written + 1, what, "lower max_new_tokens")
    room = backbone.max_position_embeddings - written
    require(
        not options.chat_template or bool(tokenizer.chat_template),
        "the tokenizer has no chat template, as with many base models: set --chat_template false",
    )
    usual = PromptConfig.thinking_suffix if "<think>" in tokenizer.get_vocab() else ""
    prompt = PromptConfig(
        query_template=options.prompt,
        chat_template=options.chat_template,
        thinking_suffix=usual if options.thinking_suffix is None else options.thinking_suffix,
        query_max_length=min(options.max_length or room, room),
    )
    return PromptTokenizer(tokenizer, prompt)


def seed_of(seed: int, query_id: str) -> int:
    """The seed of one query's text, in 0..2^32-1."""
    return int.from_bytes(hashlib.sha256(f"{seed} {query_id}".encode()).digest()[:4], "little")


def report_file(output: Path) -> Path:
    """Where the settings and times of `output` stand."""
    return output.with_name(f"{output.name}.report.json")


def _held_rewrites(output: Path, claim: Claim, wanted: dict[str, EvalQuery]) -> dict[str, Rewrite]:
    """What a claimed output holds, by query id; a last line that was cut short is taken off. Raises
    an OutputError where nobody knows how it was written or it is of other queries, and a DataError
    where another line is damaged."""
    content = output.read_bytes() if output.exists() else b""
    if not content:
        return {}
    if claim.recorded is None:
        raise OutputError(
            f"{output} is there without a whole {report_file(output).name}, so nobody knows how it "
            "was written: bring that back from a copy, or choose another --output"
        )
    if not content.endswith(b"\n"):  # a killed process left its last line unfinished
        os.truncate(output, content.rfind(b"\n") + 1)
    rewrites = read_rewrites(output)
    for id_, rewrite in rewrites.items():
        if id_ not in wanted or rewrite.query != wanted[id_].text or rewrite.cost is None:
            fault = f"{output} holds a rewrite of {id_!r} that is of none of these queries"
            raise OutputError(f"{fault}: choose another --output")
    return rewrites


def append(output: Path, rewrites: dict[str, Rewrite]) -> None:
    """Writes whole lines and waits until they are on the disk. Raises an OSError that names the
    file, which is as it was before."""
    rows = [rewrite.as_row(id_) for id_, rewrite in rewrites.items()]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with output.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            view = memoryview(text.encode())
            while view:
                view = view[file.write(view) or 0 :]
            os.fsync(file.fileno())
        except OSError as error:
            os.ftruncate(file.fileno(), size)
            raise OSError(error.errno, error.strerror, str(output)) from error


def rewrite(options: RewriteOptions) -> dict[str, Any]:
    """Rewrites what the output lacks. Returns what NAME.report.json then holds."""
    queries = read_wanted(options)
    directory, output = model_directory(options.model), Path(options.output)
    require(output.parent.is_dir(), f"the folder {output.parent} does not exist; make it first")
    backbone = read_backbone_config(directory)
    tokenizer = load_tokenizer_for(directory, backbone)
    maker = prompt_maker(options, tokenizer, backbone)
    prompts = {id_: maker.query_prompt(q.text, q.instruction or "") for id_, q in queries.items()}
    params = load_params(directory, backbone, dtype=jnp.dtype(options.compute_dtype))
    stops = stop_ids(directory, tokenizer)
    settings = _settings(options, maker, stops, fingerprint(params))

    def changed(old: dict[str, Any]) -> list[Change]:
        return changes(old["settings"], settings, source="settings")

    with Claim(output.parent, report_file(output).name, changed, file=output.name) as claim:
        rewrites = _held_rewrites(output, claim, queries)
        before = len(rewrites)
        _log.info("%d queries, %d of them written before", len(queries), before)
        if claim.recorded is None:
            claim.record(json_text({"settings": settings}))
        left = {id_: prompts[id_].ids for id_ in queries if id_ not in rewrites}
        if left:
            generator = TextGenerator(
                {"params": params},
                backbone,
                options,
                stops,
                dtype=jnp.dtype(options.compute_dtype),
                batch_size=options.batch_size,
                length_multiple=options.length_multiple,
            )
            for batch in _written(generator, left, options.seed, len(queries)):
                found = {
                    id_: _as_rewrite(queries[id_], len(left[id_]), written, tokenizer)
                    for id_, written in batch.items()
                }
                append(output, found)
                rewrites |= found
        report = {
            "settings": settings,
            "machine": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
            "shortened_queries": sum(prompt.truncated for prompt in prompts.values()),
            **_statistics(rewrites),
        }
        claim.record(json_text(report))
    return report | {"written_before": before}


def _settings(
    options: RewriteOptions, prompts: PromptTokenizer, stops: Sequence[int], weights: str
) -> dict[str, Any]:
    """What decides on the text of a rewrite, rounding aside."""
    keys = ("model", "prompt", "chat_template", "compute_dtype")
    keys += ("max_new_tokens", "temperature", "seed")
    return {
        **{key: getattr(options, key) for key in keys},
        "weights": weights,
        "thinking_suffix": prompts.config.thinking_suffix,
        "prompt_max_length": prompts.config.query_max_length,
        "prompt_checksum": prompts.checksum(),
        "stop_ids": list(stops),
    }


def _written(
    generator: TextGenerator, left: Mapping[str, list[int]], seed: int, total: int
) -> Iterator[dict[str, Written]]:
    """What is written after the prompts, a batch at a time, by query id."""
    ids, rows = list(left), list(left.values())
    generator.warm_up(rows, progress="compile")
    batches = generator.write_batches(rows, [seed_of(seed, id_) for id_ in ids])
    before, tokens, seconds = total - len(ids), 0, 0.0
    with tqdm(total=total, initial=before, desc="rewrite", unit="query", disable=None) as bar:
        for batch in batches:
            yield {ids[place]: written for place, written in batch}
            before += len(batch)
            tokens += sum(written.tokens for _, written in batch)
            seconds += batch[0][1].prefill_seconds + batch[0][1].decode_seconds
            rate = f"{tokens / seconds:.1f} tokens/s"
            bar.set_postfix_str(rate)
            bar.update(len(batch))
            if bar.disable:  # no terminal
                _log.info("%d of %d queries, %s", before, total, rate)


def _as_rewrite(
    query: EvalQuery, prompt_tokens: int, written: Written, tokenizer: Tokenizer
) -> Rewrite:
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(written.ids, **plain)
    seconds = written.prefill_seconds, written.decode_seconds
    cost = WritingCost(prompt_tokens, written.tokens, written.rows, *seconds)
    return Rewrite(str(text), query.text, written.finished, cost)


def _statistics(rewrites: dict[str, Rewrite]) -> dict[str, Any]:
    """Statistics of all rewrites in the file, whichever process wrote them."""
    costs = [rewrite.cost for rewrite in rewrites.values() if rewrite.cost is not None]
    shares = milliseconds_per_query(rewrites)
    assert shares is not None
    whole = shares.sum(axis=1)
    times = {"prefill": shares[:, 0], "decode": shares[:, 1], "in all": whole}
    times["until its batch was done"] = whole * [cost.rows for cost in costs]
    reading, writing = shares.sum(axis=0) / 1000
    return {
        "queries": len(rewrites),
        "cut_by_max_new_tokens": sum(not rewrite.finished for rewrite in rewrites.values()),
        "empty": sum(not rewrite.text.strip() for rewrite in rewrites.values()),
        "prompt_tokens": sum(cost.prompt_tokens for cost in costs),
        "tokens": sum(cost.tokens for cost in costs),
        "largest_batch": max(cost.rows for cost in costs),
        "milliseconds_a_query": {name: _spread(values) for name, values in times.items()},
        "prompt_tokens_per_second": sum(cost.prompt_tokens for cost in costs) / reading,
        "tokens_per_second": sum(cost.tokens for cost in costs) / writing,
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    median, p90 = np.quantile(values, [0.5, 0.9]).tolist()
    return {"mean": float(values.mean()), "median": median, "p90": p90}


def _run(options: RewriteOptions) -> None:
    report = rewrite(options)
    print(
        f"{report['queries']} rewrites in {options.output}, {report['written_before']} of them "
        f"from before; {report['cut_by_max_new_tokens']} were cut by --max_new_tokens "
        f"{options.max_new_tokens}, {report['empty']} are empty"
    )
    if report["shortened_queries"]:
        limit = report["settings"]["prompt_max_length"]
        print(f"{report['shortened_queries']} queries were shortened to prompts of {limit} tokens")
    print(
        f"on {report['machine']}, in batches of up to {report['largest_batch']}: "
        f"{report['prompt_tokens_per_second']:.0f} prompt tokens/s read, "
        f"{report['tokens_per_second']:.1f} tokens/s written\n"
    )
    times = report["milliseconds_a_query"]
    rows = [[name, *(f"{value:.1f}" for value in v.values())] for name, v in times.items()]
    print(markdown_table(["milliseconds a query", "mean", "median", "p90"], rows))


main = program(
    "rewrite",
    RewriteOptions,
    _run,
    stopped="stopped; the same command goes on from what is written",
)
