"""Reasoning for training rows that lack it: `python -m laser_jax.annotate --input train.jsonl
--output DIR --base_url URL --model NAME` writes DIR/train.jsonl. Every answer is in
DIR/answers.jsonl at once, so the same command goes on after an interruption."""

import asyncio
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laser_jax.annotate.answers import Answer, marks_of
from laser_jax.annotate.endpoint import KEY_VARIABLE, Endpoint, hash_of
from laser_jax.command_line import program
from laser_jax.data.schema import TrainingRow, parse_row
from laser_jax.files.claim import Claim
from laser_jax.files.durable import (
    json_text,
    read_state,
    read_state_lines,
    write_json,
    written_whole,
)
from laser_jax.files.reading import json_lines, parse_json
from laser_jax.files.terminal import printable
from laser_jax.settings import build, changes, require, require_in

REASONING_PROMPT = """Instruction:
Given a question, your mission is to follow the instructions below:
1. Identify the essential problem.
2. Think step by step to reason and describe what information could be relevant and helpful to \
address the questions in detail.
3. Draft an answer with as many thoughts as you have.
The given question:
[Begin of Question]
{query}
[End of Question]"""
"""The paper's (its Table 1)."""

OUTPUT_FILE, JOURNAL_FILE = "train.jsonl", "answers.jsonl"
RECORD_FILE, REPORT_FILE = "annotate.json", "report.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnnotateOptions:
    """Writes reasoning for the training rows that lack it, with a model behind any
    OpenAI-compatible endpoint. Its key, where one is wanted, is in the environment variable
    OPENAI_API_KEY."""

    input: str
    """A JSONL file (.gz too) of training rows."""
    output: str
    """A directory, empty or of the same annotation: train.jsonl, answers.jsonl, report.json."""
    base_url: str
    """Such as https://HOST/v1; /chat/completions is added."""
    model: str
    """As the endpoint names it."""
    prompt: str = REASONING_PROMPT
    """What the model is told; {query} stands for the query, {instruction} for its instruction."""
    max_new_tokens: int = 1024
    """Of an answer, with what a reasoning model thinks before; one that reaches it is marked."""
    temperature: float | None = None
    """None leaves it to the endpoint."""
    concurrency: int = 8
    """Requests at a time."""
    keep_marked: bool = False
    """Give marked rows their reasoning too."""
    dry_run: int | None = None
    """Send so many prompts and write nothing: print the answers, and what is left to do and what it
    takes, by these answers and those that are there. 0 sends nothing."""
    price: tuple[float, float] | None = None
    """Of a million tokens of prompts and of answers, in any currency, such as [0.2,0.8]."""

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "", "max_new_tokens", "concurrency")
        require_in("[0, inf)", self, "", "temperature", "dry_run", "price")
        require("{query}" in self.prompt, f"prompt {self.prompt!r} has no {{query}} placeholder")
        fault = "base_url must be http(s)://HOST/PATH, without user, password, ? and #"
        require(re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", self.base_url) is not None, fault)

    def settings(self) -> dict[str, Any]:
        """What decides on an answer."""
        keys = ("model", "prompt", "max_new_tokens", "temperature")
        return {key: getattr(self, key) for key in keys}

    def totals(self, prompt_tokens: float, completion_tokens: float) -> dict[str, Any]:
        """Tokens, and their cost in the currency of the prices; None without them."""
        cost = None
        if self.price is not None:
            cost = (prompt_tokens * self.price[0] + completion_tokens * self.price[1]) / 1e6
        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        return {**{key: round(count) for key, count in counts.items()}, "cost": cost}


Row = tuple[str, dict[str, Any], TrainingRow, str]
"""The place of a line, its object, its row and its prompt: "" where it has its reasoning."""


def read_rows(path: str, template: str) -> Iterator[Row]:
    """Raises an OSError, and a DataError that names the line."""
    for where, line in json_lines(path):
        record = parse_json(line, where)
        row = parse_row(record, where)
        texts = {"{query}": row.query, "{instruction}": row.prompt}
        parts = re.split(r"(\{query\}|\{instruction\})", template)
        prompt = "".join(texts.get(part, part) for part in parts)
        yield where, record, row, "" if row.reasoning_query.strip() else prompt


def read_answers(path: Path) -> dict[str, Answer]:
    """A journal by the hashes of the prompts; a line that a kill has cut off is left out."""
    answers = read_state_lines(path, lambda values: build(Answer, values))
    return {answer.prompt_hash: answer for answer in answers}


def ask_all(
    options: AnnotateOptions, prompts: Collection[str], take: Callable[[Answer], None]
) -> None:
    """Gives the answer to each prompt to `take`. Raises as `Endpoint.ask`, whereupon the other
    requests are given up, and a ConfigError on what can be no key."""
    limits = {"max_tokens": options.max_new_tokens, "temperature": options.temperature}
    body = {"model": options.model} | {k: v for k, v in limits.items() if v is not None}
    key, waiting = os.environ.get(KEY_VARIABLE, "").strip(), enumerate(prompts)
    is_one = key.isascii() and key.isprintable() and " " not in key
    require(is_one, f"{KEY_VARIABLE} holds a character that no API key has")
    _log.info("%d prompts to %s with%s a key", len(prompts), options.base_url, "" if key else "out")

    async def work(endpoint: Endpoint) -> None:
        for number, prompt in waiting:
            if number % max(10, len(prompts) // 50) == 0:
                _log.info("prompt %d of %d", number + 1, len(prompts))
            take(await endpoint.ask(prompt))

    async def main() -> None:
        endpoint = Endpoint(options.base_url, body, key)
        async with endpoint.client, asyncio.TaskGroup() as group:
            for _ in range(min(options.concurrency, len(prompts))):
                group.create_task(work(endpoint))

    try:
        asyncio.run(main())
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def annotate(options: AnnotateOptions) -> dict[str, Any]:
    """Asks for what is missing, then writes the rows. Returns the report, also in report.json. What
    was answered is kept where an EndpointError says that the endpoint cannot be used."""
    settings, output = options.settings(), Path(options.output)
    journal, target = output / JOURNAL_FILE, output / OUTPUT_FILE
    require(Path(options.input).resolve() != target.resolve(), "output would replace the input")
    rows = list(read_rows(options.input, options.prompt))
    with Claim(
        output, RECORD_FILE, lambda old: changes(old, settings, source=RECORD_FILE), alone=True
    ) as claim:
        answers = read_answers(journal)
        if journal.is_file():  # a killed process left its last line unfinished
            os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)

        def take(answer: Answer) -> None:
            if not answers:
                claim.record(json_text(settings))
            with journal.open("ab") as file:
                file.write(f"{json.dumps(asdict(answer), ensure_ascii=False)}\n".encode())
            answers[answer.prompt_hash] = answer

        prompts = dict.fromkeys(prompt for *_, prompt in rows if prompt)
        ask_all(options, [p for p in prompts if hash_of(p) not in answers], take)
        claim.record(json_text(settings))
        with written_whole(target) as part:
            counts = _write(part, rows, answers, options.keep_marked)
        report = {"rows": dict(counts), **options.totals(*_tokens(answers.values()))}
        write_json(output / REPORT_FILE, report | {"options": vars(options)})
    _log.info("%s", json.dumps(report))
    return report


def _write(
    path: Path, rows: Sequence[Row], answers: Mapping[str, Answer], keep_marked: bool
) -> Counter[str]:
    """Writes the rows with what was answered. Returns counts of them."""
    counts: Counter[str] = Counter()
    with path.open("wb") as file:
        for _, record, row, prompt in rows:
            counts["all"] += 1
            if prompt:
                answer = answers[hash_of(prompt)]
                record["annotation"] = annotation = _annotation(answer, row)
                is_kept = keep_marked or not annotation["marks"]
                record |= {"reasoning_query": answer.text.strip()} if is_kept else {}
                counts.update(["annotated" if is_kept else "left without", *annotation["marks"]])
            # half a surrogate pair in a field of others becomes the escape that JSON has for it
            line = json.dumps(record, ensure_ascii=False)
            file.write(f"{line}\n".encode(errors="backslashreplace"))
    return counts


def _annotation(answer: Answer, row: TrainingRow) -> dict[str, Any]:
    tokens = {"prompt": answer.prompt_tokens, "completion": answer.completion_tokens}
    values = {key: getattr(answer, key) for key in ("model", "prompt_hash", "finish_reason")}
    return values | {"tokens": tokens, "marks": marks_of(answer, row)}


def _tokens(answers: Collection[Answer]) -> tuple[int, int]:
    """Of all prompts, and of all answers."""
    prompt_tokens = sum(answer.prompt_tokens or 0 for answer in answers)
    return prompt_tokens, sum(answer.completion_tokens or 0 for answer in answers)


def look_ahead(options: AnnotateOptions, count: int) -> None:
    """Prints the answers to the first `count` prompts, then what those take that are left: going by
    the answers of this call and in the journal, and where there is none by 4 characters a token and
    answers of full length, without a time (null). Raises as `annotate`."""
    output = Path(options.output)
    is_ours = read_state(output / RECORD_FILE, dict) == options.settings()
    done = read_answers(output / JOURNAL_FILE) if is_ours else {}
    rows = [row for row in read_rows(options.input, options.prompt) if row[-1]]
    measured, chosen = dict(done), rows[:count]
    prompts = dict.fromkeys(prompt for *_, prompt in chosen)
    ask_all(options, prompts, lambda answer: measured.update({answer.prompt_hash: answer}))
    for where, _, row, prompt in chosen:
        answer = measured[hash_of(prompt)]
        about = json.dumps(_annotation(answer, row))
        print(printable(f"--- {where} {about}\n{prompt}\n>>>\n{answer.text}\n"))
    lengths = {hash_of(prompt): len(prompt) for *_, prompt in rows}
    known = [measured[key] for key in lengths if key in measured and measured[key].prompt_tokens]
    left = [length for key, length in lengths.items() if key not in done]
    tokens, seconds = (sum(left) / 4, float(len(left) * options.max_new_tokens)), None
    if known:
        totals, share = _tokens(known), len(left) / len(known)
        ratio = sum(left) / sum(lengths[answer.prompt_hash] for answer in known)
        tokens = totals[0] * ratio, totals[1] * share
        seconds = sum(answer.seconds for answer in known) * share / options.concurrency
    counts = {"requests": len(left), "prompt_characters": sum(left), "measured_on": len(known)}
    print(json_text({**counts, "seconds": seconds, **options.totals(*tokens)}), end="")


def _run(options: AnnotateOptions) -> None:
    if options.dry_run is not None:
        look_ahead(options, options.dry_run)
    else:
        print(f"{options.output}/{OUTPUT_FILE}: {json.dumps(annotate(options)['rows'])}")


main = program(
    "annotate",
    AnnotateOptions,
    _run,
    stopped="stopped; the same command goes on from what is answered",
)
