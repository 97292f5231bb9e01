"""Reasoning from an endpoint: what is asked, what is kept, and what a bad endpoint does to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from laser_jax.annotate.answers import Answer, marks_of
from laser_jax.annotate.endpoint import EndpointError, hash_of, retry_after
from laser_jax.annotate.run import AnnotateOptions, annotate, main, read_rows
from laser_jax.config import ConfigError
from laser_jax.data.schema import TrainingRow
from laser_jax.data.sources import open_source
from laser_jax.files.claim import OutputError
from laser_jax.files.reading import DataError

SECRET = "sk-test-0123456789-very-secret"
TOWNS = ["Ulm", "Kiel", "Jena", "Bonn", "Hof", "Trier"]
PASSAGE = "It lies on the river Danube, where the Iller joins it, and has the tallest church tower."

Reply = tuple[int, dict[str, str], bytes] | None
"""Status, headers and body; None hangs up."""


def said(text: str | None, finish_reason: str = "stop", **message: Any) -> Reply:
    message = {"role": "assistant", "content": text, **message}
    usage = {"prompt_tokens": 50, "completion_tokens": 20}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    body = {"model": "teacher-2026", "choices": [choice], "usage": usage}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def fault(status: int, text: str = "busy", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Type": "text/plain"} | named, text.encode()


class Drops(bytes):
    """A body that comes byte by byte, ten a second."""


class Stub:
    """An endpoint that replies as it is told: `reply` gets the number of the request, counted from
    0, and its prompt."""

    def __init__(self, reply: Callable[[int, str], Reply]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.places: list[str] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    number = len(stub.bodies)
                    stub.bodies.append(body)
                    stub.headers.append(dict(self.headers))
                    stub.places.append(self.path)
                answer = reply(number, body["messages"][0]["content"])
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, content = answer
                with suppress(ConnectionError):  # the asker was killed
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    size = 1 if isinstance(content, Drops) else 1 << 20
                    for start in range(0, len(content), size):
                        self.wfile.write(content[start : start + size])
                        time.sleep(0.1 if size == 1 else 0)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.02])
        self._thread.start()

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[int, str], Reply]], Stub]]:
    stubs: list[Stub] = []

    def start(reply: Callable[[int, str], Reply]) -> Stub:
        stubs.append(Stub(reply))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that are waited, which are not waited."""
    slept, sleep = [], asyncio.sleep

    async def note(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    return slept


def row(town: str, reasoning: str = "", **more: Any) -> dict[str, Any]:
    positive = [f"{town} is a town. {PASSAGE}"]
    record = {"query": f"Where is {town}?", "reasoning_query": reasoning, "prompt": "Find it"}
    return {**record, "positive_passages": positive, "negative_passages": [], **more}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def towns(tmp_path: Path) -> Path:
    return write(tmp_path / "towns.jsonl", [row(town) for town in TOWNS])


def options(data: Path, stub: Stub, **more: Any) -> AnnotateOptions:
    asked = {"base_url": stub.url, "model": "teacher", "concurrency": 1, **more}
    return AnnotateOptions(**{"input": str(data), "output": str(data.parent / "out"), **asked})


def flags(asked: AnnotateOptions) -> list[str]:
    given = {name: value for name, value in vars(asked).items() if value is not None}
    return [f"--{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in given.items()]


def results(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]


def test_rows_keep_their_order_and_fields_and_those_without_reasoning_get_one(
    tmp_path: Path, serve
) -> None:
    rows = [row("Ulm", id=7), row("Kiel", "By the sea.", x="\ud83d"), row("Jena"), row("Ulm")]
    rows[2]["reasoning_query"] = " \n"
    data = write(tmp_path / "rows.jsonl", rows)
    stub = serve(lambda _, prompt: said(f" About {prompt[6:]}\n\nEnd. "))
    asked = "{query} | {instruction} | {other}"
    report = annotate(options(data, stub, prompt=asked, temperature=0.5))
    assert sorted(stub.prompts) == [f"Where is {t}? | Find it | {{other}}" for t in ("Jena", "Ulm")]
    assert set(stub.places) == {"/v1/chat/completions"}
    assert stub.headers[0]["Authorization"] == f"Bearer {SECRET}"
    limits = {key: stub.bodies[0][key] for key in stub.bodies[0].keys() - {"messages"}}
    wanted = {"model": "teacher", "max_tokens": 1024, "temperature": 0.5}
    assert limits == wanted | {"stream": False}  # there are servers that stream unless told
    found = results(tmp_path / "out")
    assert found[1] == rows[1]
    for i in (0, 2, 3):
        annotation = found[i].pop("annotation")
        prompt = f"{rows[i]['query']} | Find it | {{other}}"
        assert found[i] == rows[i] | {"reasoning_query": f"About {prompt[6:]}\n\nEnd."}
        assert annotation == {
            "model": "teacher-2026",
            "prompt_hash": hash_of(prompt),
            "finish_reason": "stop",
            "tokens": {"prompt": 50, "completion": 20},
            "marks": [],
        }
    assert report["rows"] == {"all": 4, "annotated": 3}
    assert (report["prompt_tokens"], report["completion_tokens"]) == (100, 40)
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["rows"] == report["rows"]


def test_the_output_is_a_source_of_training_rows(towns: Path, serve) -> None:
    stub = serve(lambda number, _: said(f"Answer {number}"))
    annotate(options(towns, stub))
    source = open_source(str(towns.parent / "out" / "train.jsonl"))
    assert [source[i].reasoning_query for i in range(6)] == [f"Answer {i}" for i in range(6)]


def test_a_placeholder_in_a_query_is_no_placeholder(tmp_path: Path) -> None:
    record = row("Ulm") | {"query": "{instruction} {query}", "prompt": "{query}"}
    data = write(tmp_path / "rows.jsonl", [record])
    (found,) = read_rows(str(data), "{instruction}: {query}")
    assert found[3] == "{query}: {instruction} {query}"


@pytest.mark.parametrize(
    ("text", "finish_reason", "marks"),
    [
        ("The town lies on a river; its name is what a document must hold.", "stop", []),
        ("I'm sorry, but I can't help with that.", "stop", ["refusal"]),
        ("Unfortunately, I cannot say.", "stop", ["refusal"]),
        ("I’m unable to answer.", "stop", ["refusal"]),
        ("I can see three steps here. I can't skip one.", "stop", []),
        ("", "content_filter", ["empty", "content_filter"]),
        ("It begins well and", "length", ["cut"]),
        (f"As is known: {PASSAGE.upper()[:70]}", "stop", ["quote"]),
        (f"As is known: {PASSAGE[:50]}", "stop", []),
        ("Only this short passage, says someone.", "stop", ["quote"]),
        (" \n", None, ["empty"]),
    ],
)
def test_marks(text: str, finish_reason: str | None, marks: list[str]) -> None:
    passages = (f"Ulm  is a town.\n{PASSAGE}", "only this short passage", "Ulm", "river")
    wanted = TrainingRow("Where is Ulm?", "", "", passages, ())
    assert marks_of(Answer("", "m", text, finish_reason), wanted) == marks


def test_what_the_query_says_itself_is_no_quote() -> None:
    asked = TrainingRow(f"Is it true? {PASSAGE}", "", "", (PASSAGE,), ())
    assert marks_of(Answer("", "m", f"The claim is: {PASSAGE}", "stop"), asked) == []


def test_marked_rows_get_their_reasoning_only_when_asked_for(towns: Path, serve) -> None:
    replies = [
        said("I'm sorry, I can't."),
        said(None, refusal="It is against the rules."),
        said("Half of", "length"),
        said(PASSAGE),
        said("Fine."),
        said("", "content_filter"),
    ]
    stub = serve(lambda number, _: replies[number])
    report = annotate(options(towns, stub))
    found = results(towns.parent / "out")
    assert [r["reasoning_query"] for r in found] == ["", "", "", "", "Fine.", ""]
    marks = [r["annotation"]["marks"] for r in found]
    assert marks[:5] == [["refusal"], ["refusal"], ["cut"], ["quote"], []]
    counts = {"refusal": 2, "cut": 1, "quote": 1, "empty": 1, "content_filter": 1}
    assert report["rows"] == {"all": 6, "annotated": 1, "left without": 5, **counts}
    annotate(options(towns, stub, keep_marked=True))
    assert len(stub.bodies) == 6
    kept = [r["reasoning_query"] for r in results(towns.parent / "out")]
    assert kept[1:4] == ["It is against the rules.", "Half of", PASSAGE]


# --- a bad endpoint ----------------------------------------------------------------------------


def test_a_busy_endpoint_is_asked_again_when_it_says_so_or_ever_later(
    towns: Path, serve, waits: list[float]
) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=100), usegmt=True)
    replies = [
        *(fault(429, Retry_After="7"), fault(503, Retry_After=date), fault(429, Retry_After=past)),
        *(fault(500), None, fault(502, "<html>bad gateway</html>", Retry_After="soon")),
    ]
    stub = serve(lambda number, _: replies[number] if number < len(replies) else said("Fine."))
    annotate(options(towns, stub))
    assert len(stub.bodies) == len(replies) + len(TOWNS)
    assert waits[0] == 7.0
    assert 60 < waits[1] <= 100
    assert waits[2] == 0.0
    for attempt in (3, 4, 5):
        assert 2**attempt / 2 <= waits[attempt] <= 2**attempt
    assert len(waits) == len(replies)


def test_a_date_beyond_all_calendars_is_no_time_to_wait_for() -> None:
    assert retry_after("Mon, 01 Jan 99999999999999999999 00:00:00 GMT") is None


@pytest.mark.parametrize("reply", [fault(429, "slow down"), None])
def test_an_endpoint_that_goes_on_failing_is_given_up(
    towns: Path, serve, waits: list[float], reply: Reply
) -> None:
    stub = serve(lambda *_: reply)
    what = "slow down" if reply else "RemoteProtocolError"
    with pytest.raises(EndpointError, match=f"failed 8 times, at last with .*{what}"):
        annotate(options(towns, stub))
    assert (len(stub.bodies), len(waits)) == (8, 7)
    assert not (towns.parent / "out").exists()


def test_an_answer_that_takes_too_long_is_asked_for_again(
    towns: Path, serve, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_again = threading.Event()

    def reply(number: int, _: str) -> Reply:
        (asked_again.set if number else asked_again.wait)()
        return said("Fine.")

    monkeypatch.setattr("httpx2.Timeout", lambda *_, **__: 0.5)
    stub = serve(reply)
    annotate(options(towns, stub))
    assert stub.prompts[0] == stub.prompts[1]
    assert [r["reasoning_query"] for r in results(towns.parent / "out")] == ["Fine."] * 6


def test_an_answer_that_comes_in_drops_is_given_up_too(
    towns: Path, serve, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some endpoints send white space as long as a request waits: no read takes long."""
    monkeypatch.setattr("laser_jax.annotate.endpoint._LONGEST_ANSWER", 0.5)

    def reply(number: int, _: str) -> Reply:
        status, headers, content = said("Fine.") or fault(500)
        return status, headers, content if number else Drops(b" " * 100 + content)

    stub = serve(reply)
    began = time.monotonic()
    annotate(options(towns, stub))
    assert time.monotonic() - began < 8
    assert stub.prompts[0] == stub.prompts[1]
    assert [r["reasoning_query"] for r in results(towns.parent / "out")] == ["Fine."] * 6


def test_nobody_listens(towns: Path, serve, waits: list[float]) -> None:
    stub = Stub(lambda *_: None)
    stub.close()
    with pytest.raises(EndpointError, match="failed 8 times, at last with ConnectError"):
        annotate(options(towns, stub))


def html(text: str = "<html>Log in</html>") -> Reply:
    return 200, {"Content-Type": "text/html"}, text.encode()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (fault(401, f"bad key {SECRET}"), r"401, text/plain, 'bad key \[API key\]': set the env"),
        (fault(403, "not yours"), "'not yours': the key has no right"),
        (fault(404, "no such model"), "'no such model': --base_url often ends in /v1"),
        (fault(301, "", Location="http://127.0.0.1:1/"), "answered status 301"),
        (fault(400, "what is top_k?"), r"status 400, .*what is top_k\?"),
        (fault(429, "tomorrow", Retry_After="86400"), "asked again in 86400 s: .*tomorrow"),
        (html(), "no chat completion but status 200, text/html, '<html>Log in</html>'"),
        ((200, {}, b'{"error": "overloaded"}'), 'no chat completion but .*"overloaded"'),
        ((200, {}, b'{"choices": []}'), "no chat completion"),
        ((200, {}, b"[1]"), "no chat completion"),
        ((200, {}, b'{"choices": [{"message": {"content": 5}}]}'), "no chat completion"),
    ],
)
def test_what_no_patience_mends_stops_at_once_and_is_named(
    towns: Path, serve, waits: list[float], reply: Reply, message: str
) -> None:
    stub = serve(lambda *_: reply)
    with pytest.raises(EndpointError, match=message) as error:
        annotate(options(towns, stub))
    assert stub.url in str(error.value)
    assert (len(stub.bodies), waits) == (1, [])
    assert not (towns.parent / "out").exists()


def test_a_prompt_that_is_rejected_is_marked_and_does_not_stop_the_rest(towns: Path, serve) -> None:
    replies = [said("Fine."), fault(400, "too long"), fault(400, '{"code": "content_filter"}')]
    stub = serve(lambda number, _: replies[number] if number < 3 else said("Fine."))
    rows = annotate(options(towns, stub, keep_marked=True))["rows"]
    assert (rows["rejected"], rows["content_filter"], rows["all"]) == (1, 1, 6)
    assert [r["reasoning_query"] for r in results(towns.parent / "out")][:3] == ["Fine.", "", ""]


def test_a_model_that_wants_its_limit_under_the_newer_name_gets_it(
    towns: Path, serve, waits: list[float]
) -> None:
    def reply(number: int, _: str) -> Reply:
        if "max_tokens" in stub.bodies[number]:
            return fault(400, "max_tokens is not supported: use max_completion_tokens")
        return said("Fine.")

    stub = serve(reply)
    annotate(options(towns, stub, max_new_tokens=9))
    assert [body.get("max_completion_tokens") for body in stub.bodies] == [None] + [9] * 6


def test_half_a_surrogate_pair_in_an_answer_becomes_a_question_mark(towns: Path, serve) -> None:
    annotate(options(towns, serve(lambda *_: said("A castle \ud83c", "length")), keep_marked=True))
    assert results(towns.parent / "out")[0]["reasoning_query"] == "A castle ?"


def test_so_many_requests_are_under_way_at_a_time(towns: Path, serve) -> None:
    together, lock, under_way, most = threading.Barrier(3), threading.Lock(), [0], [0]

    def reply(*_: Any) -> Reply:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        together.wait(timeout=60)
        with lock:
            under_way[0] -= 1
        return said("Fine.")

    annotate(options(towns, serve(reply), concurrency=3))
    assert most == [3]


# --- going on ----------------------------------------------------------------------------------


def test_a_killed_run_goes_on_from_what_was_answered(
    towns: Path, serve, one_device: dict[str, str]
) -> None:
    hangs, ends = threading.Event(), threading.Event()

    def reply(number: int, prompt: str) -> Reply:
        if number == 3:
            hangs.set()
            ends.wait()
        return said(f"On {prompt.splitlines()[-2]}")

    stub = serve(reply)
    asked = options(towns, stub)
    command = [sys.executable, "-m", "laser_jax.annotate", *flags(asked)]
    environment = one_device | {"OPENAI_API_KEY": SECRET}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        while not hangs.wait(0.1):
            assert process.poll() is None, process.communicate()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    ends.set()
    output = towns.parent / "out"
    journal = (output / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in journal] == [
        f"On Where is {town}?" for town in TOWNS[:3]
    ]
    assert not (output / "train.jsonl").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f'{output}/train.jsonl: {{"all": 6, "annotated": 6}}' in done.stdout
    assert len(stub.bodies) == 4 + 3
    assert [r["reasoning_query"] for r in results(output)] == [
        f"On Where is {town}?" for town in TOWNS
    ]


def test_a_last_line_that_was_cut_off_is_asked_again(towns: Path, serve) -> None:
    stub = serve(lambda number, _: said(f"Answer {number}"))
    annotate(options(towns, stub))
    journal = towns.parent / "out" / "answers.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(content[:-9])
    annotate(options(towns, stub))
    assert stub.prompts[6:] == stub.prompts[5:6]
    assert [json.loads(line)["text"] for line in journal.read_text().splitlines()] == [
        f"Answer {i}" for i in (0, 1, 2, 3, 4, 6)
    ]


@pytest.mark.parametrize("changed", ["model", "prompt", "max_new_tokens", "temperature"])
def test_answers_to_another_prompt_or_of_another_model_do_not_mix(
    towns: Path, serve, changed: str
) -> None:
    stub = serve(lambda *_: said("Fine."))
    annotate(options(towns, stub))
    before = results(towns.parent / "out")
    values = {"prompt": "{query}", "max_new_tokens": 3, "temperature": 1.0}
    with pytest.raises(OutputError, match=f"another config:\n  {changed} was"):
        annotate(options(towns, stub, **{changed: values.get(changed, "other")}))
    assert len(stub.bodies) == 6
    assert results(towns.parent / "out") == before


def test_more_rows_ask_for_no_more_than_what_is_new(towns: Path, serve) -> None:
    stub = serve(lambda *_: said("Fine."))
    annotate(options(towns, stub))
    write(towns, [row("Worms"), *(row(town) for town in reversed(TOWNS))])
    annotate(options(towns, stub))
    assert len(stub.bodies) == 7
    assert [r["query"][9:-1] for r in results(towns.parent / "out")] == ["Worms", *TOWNS[::-1]]


# --- before money is spent ---------------------------------------------------------------------


def test_an_estimate_sends_nothing(towns: Path, serve, capsys) -> None:
    stub = serve(lambda *_: said("Fine."))
    main(flags(options(towns, stub, dry_run=0, price=(2.0, 8.0), max_new_tokens=100)))
    found = json.loads(capsys.readouterr().out)
    assert stub.bodies == []
    assert found["requests"] == 6
    tokens = found["prompt_characters"] / 4
    assert found["prompt_tokens"] == round(tokens)
    assert found["completion_tokens"] == 600
    assert found["cost"] == pytest.approx((2 * tokens + 8 * 600) / 1e6)
    assert (found["seconds"], found["measured_on"]) == (None, 0)
    assert not (towns.parent / "out").exists()


def test_an_estimate_goes_by_the_answers_of_a_dry_run_or_of_the_journal(
    tmp_path: Path, serve, capsys
) -> None:
    stub = serve(lambda *_: said("Fine."))
    data = write(tmp_path / "rows.jsonl", [row(town) for town in ("Ulm", "Hof", "Ems", "Rom")])

    def estimated(**more: Any) -> dict[str, Any]:
        main(flags(options(data, stub, **{"dry_run": 0, "concurrency": 2, **more})))
        out = capsys.readouterr().out
        return json.loads(out[out.rindex("{\n") :])

    dry = estimated(dry_run=1)
    assert (dry["requests"], dry["measured_on"]) == (4, 1)
    asked = write(tmp_path / "some.jsonl", [row("Ulm"), row("Hof")])
    annotate(options(asked, stub))
    found = estimated()
    assert (found["requests"], found["measured_on"]) == (2, 2)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (100, 40)
    assert found["seconds"] > 0
    assert estimated(temperature=1.0)["measured_on"] == 0


def test_a_dry_run_prints_answers_and_writes_nothing(towns: Path, serve, capsys) -> None:
    stub = serve(lambda *_: said("I'm sorry, \x1b[2J I can't.", "length"))
    main(flags(options(towns, stub, dry_run=2)))
    out = capsys.readouterr().out
    assert len(stub.bodies) == 2
    assert f"--- {towns}:2 " in out
    assert '"marks": ["refusal", "cut"]' in out
    assert "Where is Kiel?" in out
    assert "I'm sorry, \\x1b[2J I can't." in out
    assert sorted(towns.parent.iterdir()) == [towns]


# --- the secret, and what is refused -----------------------------------------------------------


def test_the_key_is_in_no_file_and_no_message(
    towns: Path, serve, one_device: dict[str, str]
) -> None:
    def reply(number: int, _: str) -> Reply:
        told = stub.headers[number]["Authorization"]
        if number == 1:
            return fault(500, f"{'x' * 285} {told}", Retry_After="0")
        return fault(401, f"wrong: {told}") if number == 4 else said("Fine.")

    stub = serve(reply)
    command = [sys.executable, "-m", "laser_jax.annotate", *flags(options(towns, stub))]
    for code in (1, 0):
        done = subprocess.run(
            command, env=one_device | {"OPENAI_API_KEY": SECRET}, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        for text in (done.stdout, done.stderr):
            assert SECRET[:10] not in text
    assert stub.headers[-1]["Authorization"] == f"Bearer {SECRET}"
    files = [path for path in towns.parent.rglob("*") if path.is_file()]
    assert len(files) >= 5
    assert [path for path in files if SECRET[:10].encode() in path.read_bytes()] == []


def test_a_key_is_taken_from_the_environment_alone(
    towns: Path, serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = serve(lambda *_: said("Fine."))
    for wrong in (
        {"base_url": f"http://user:{SECRET}@host/v1"},
        {"base_url": f"http://host/v1?key={SECRET}"},
    ):
        with pytest.raises(ConfigError, match=r"base_url ") as error:
            options(towns, stub, **wrong)
        assert SECRET not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nX: y")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds a character") as error:
        annotate(options(towns, stub))
    assert SECRET not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    annotate(options(towns, stub))
    assert stub.headers[0]["Authorization"] == f"Bearer {SECRET}"
    monkeypatch.delenv("OPENAI_API_KEY")
    annotate(options(towns, stub, output=str(towns.parent / "elsewhere")))
    assert "Authorization" not in stub.headers[-1]


def test_bad_input_is_named_before_anything_is_sent(towns: Path, serve) -> None:
    stub, folder = serve(lambda *_: said("Fine.")), towns.parent
    train = write(folder / "train.jsonl", [row("Ulm")])
    with pytest.raises(ConfigError, match=r"prompt 'Think.' has no {query} placeholder"):
        options(towns, stub, prompt="Think.")
    with pytest.raises(ConfigError, match="would replace the input"):
        annotate(options(train, stub, output=str(folder)))
    towns.write_text(towns.read_text() + "{}\n")
    with pytest.raises(DataError, match=r"towns\.jsonl:7: field 'query' is missing"):
        annotate(options(towns, stub))
    with pytest.raises(ConfigError, match="concurrency must be at least 1"):
        options(towns, stub, concurrency=0)
    assert stub.bodies == []
    assert not (folder / "out").exists()
