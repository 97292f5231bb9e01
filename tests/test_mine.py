"""Mining: the rows and the report that a command writes, and what is refused."""

from __future__ import annotations

import fcntl
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_jax.data.sources import open_source
from laser_jax.inference.retriever import LatentRetriever
from laser_jax.mine.run import main
from laser_jax.search.trec import write_trec_run

pytest.importorskip("bm25s")
pytest.importorskip("Stemmer")

DOCUMENTS = {
    "river": "The Danube is a river that flows through Ulm.",
    "minster": "Ulm has a minster with the tallest church tower.",
    "copy": "ULM has a minster  with the tallest church tower.",
    "near": "Today Ulm has a minster with the tallest church tower of all.",
    "sparrow": "The sparrow of Ulm is told of in a legend.",
    "kiel": "Kiel lies at the sea and has a harbour.",
    "moon": "Nobody has walked there since.",
    "question": "Which tower in Ulm is the tallest?",
}
TOWER = {
    "query": "Which tower in Ulm is the tallest?",
    "reasoning_query": "Ulm has a minster.",
    "prompt": "Find the fact",
    "positive_passages": [DOCUMENTS["minster"]],
    "negative_passages": ["an old negative"],
    "origin": {"line": 7},
    "teacher_scores": [2.0, 1.0],
}
SEA = {
    **{key: value for key, value in TOWER.items() if key != "teacher_scores"},
    "query": "Where is the harbour of Kiel?",
    "positive_passages": [DOCUMENTS["kiel"], "A fjord leads to Kiel's harbour."],
    "negative_passages": [],
}


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A corpus with queries.jsonl, and the rows beside it in rows.jsonl."""
    directory = tmp_path / "data"
    directory.mkdir()
    write_corpus(directory, DOCUMENTS)
    queries = [{"_id": "tower", "text": "which TOWER in Ulm is the tallest?"}]
    queries.append({"_id": "sea", "text": SEA["query"]})
    write_lines(directory / "queries.jsonl", queries)
    write_lines(directory / "rows.jsonl", [TOWER, SEA])
    return directory


def write_corpus(directory: Path, documents: dict[str, str]) -> None:
    rows = [{"_id": id_, "text": text} for id_, text in documents.items()]
    write_lines(directory / "corpus.jsonl", rows)


def run(data: Path, candidates: str = "bm25", *more: str, output: str = "out.jsonl") -> Path:
    where = ["--input", str(data / "rows.jsonl"), "--corpus", str(data)]
    path = data.parent / "made" / output
    main([*where, "--candidates", candidates, "--output", str(path), *more])
    return path


def report_of(output: Path) -> dict[str, Any]:
    return json.loads((output.parent / f"{output.name}.report.json").read_text())


def negatives(output: Path, row: int = 0) -> list[str]:
    return [source["id"] for source in lines_of(output)[row]["negative_sources"]]


# --- what is written ---------------------------------------------------------------------------


def test_rows_keep_their_fields_and_get_negatives_with_their_sources(data: Path) -> None:
    output = run(data, "bm25", "--max_share", "null")
    tower, sea = lines_of(output)
    assert tower["origin"] == {"line": 7}
    changed = ("negative_passages", "negative_sources", "positive_scores")
    assert {k: v for k, v in tower.items() if k not in changed} == {
        k: v for k, v in TOWER.items() if k not in ("negative_passages", "teacher_scores")
    }  # the scores were of the old passages
    # not the positive, its copies or the query's own text; nor what shares no word with the query
    assert set(negatives(output)) == {"river", "sparrow"}
    assert tower["negative_passages"] == [DOCUMENTS[id_] for id_ in negatives(output)]
    scores = [source["score"] for source in tower["negative_sources"]]
    assert scores == sorted(scores, reverse=True)
    assert {source["who"] for source in tower["negative_sources"]} == {"bm25"}
    assert len(sea["positive_scores"]) == 2
    assert negatives(output, 1) == []
    rows = list(open_source(output))
    assert rows[0].negative_passages == tuple(tower["negative_passages"])


def test_the_report_counts_what_happened_to_every_candidate_and_names_poor_rows(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        output = run(data, "bm25", "--max_share", "null", "--negatives", "2")
    report = report_of(output)
    # of "tower": minster and copy are its positive, question is the query; of "sea": kiel
    expected = {"positive": 3, "none": 2, "repeated": 1, "max_overlap": 1}
    assert report["candidates_by_filter"] == expected
    assert (report["rows"], report["negatives"]) == (2, 2)
    assert report["positives_that_the_corpus_lacks"] == 1
    assert report["too_few"] == {f"{data / 'rows.jsonl'}:2": 0}
    assert report["rows_with_too_few"] == 1
    assert report["rows_with_a_negative_above_a_positive"] == 0
    tower = lines_of(output)[0]
    hardest = max(source["score"] for source in tower["negative_sources"])
    assert report["median_of_hardest_negatives"] == hardest
    assert "'negatives': 2" in caplog.text


def test_a_positive_of_another_row_of_the_same_query_is_no_negative(data: Path) -> None:
    other = {**SEA, "query": f" {TOWER['query'].upper()} "}
    other["positive_passages"] = [DOCUMENTS["river"].lower()]
    write_lines(data / "rows.jsonl", [TOWER, other])
    output = run(data, "bm25", "--max_share", "null")
    assert negatives(output, 0) == negatives(output, 1) == ["sparrow"]


def test_a_blank_document_is_no_negative_and_is_named(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_corpus(data, DOCUMENTS | {"void": " \n"})
    with caplog.at_level(logging.INFO):
        run(data, "bm25", "--max_share", "null")
    assert "blank documents, left out: 1 of 9, the first is 'void'" in caplog.text


# --- a model and a run -------------------------------------------------------------------------


def test_a_model_ranks_the_corpus_as_the_retriever_does(data: Path, thinking_model: Path) -> None:
    bounds = ["--max_share", "null", "--max_overlap", "null", "--negatives", "3"]
    output = run(data, str(thinking_model), *bounds)
    retriever = LatentRetriever.from_pretrained(thinking_model)
    vectors = retriever.encode_document([*DOCUMENTS.values(), *SEA["positive_passages"]])
    for row, record in zip((TOWER, SEA), lines_of(output), strict=True):
        query = retriever.encode_query(row["query"], instruction=row["prompt"])
        scores = vectors @ query
        ranked = sorted(DOCUMENTS, key=lambda id_: -scores[list(DOCUMENTS).index(id_)])
        known = {"minster", "copy", "question"} if row is TOWER else {"kiel"}
        wanted = [id_ for id_ in ranked if id_ not in known][:3]
        assert [source["id"] for source in record["negative_sources"]] == wanted
        assert [source["rank"] for source in record["negative_sources"]] == [
            ranked.index(id_) + 1 for id_ in wanted
        ]
        assert {source["who"] for source in record["negative_sources"]} == {str(thinking_model)}
        first = record["negative_sources"][0]
        assert first["score"] == pytest.approx(scores[list(DOCUMENTS).index(first["id"])], abs=1e-5)
    of_sea = lines_of(output)[1]["positive_scores"]
    np.testing.assert_allclose(of_sea, scores[-2:], atol=1e-5)  # the second is in no corpus


def test_a_model_is_loaded_with_its_preset_and_adapter_and_nothing_else_takes_them(
    data: Path, thinking_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter").mkdir()
    load, told = LatentRetriever.from_pretrained, {}

    def loading(model: Path, *, mesh: Any, **how: Any) -> LatentRetriever:
        told.update(how)
        return load(model, mesh=mesh)

    monkeypatch.setattr(LatentRetriever, "from_pretrained", loading)
    more = ["--preset", "official", "--adapter", str(tmp_path / "adapter")]
    run(data, str(thinking_model), "--max_share", "null", *more)
    assert told == {"preset": "official", "adapter": str(tmp_path / "adapter")}
    with pytest.raises(SystemExit, match="are for a model, and candidates is 'bm25'"):
        run(data, "bm25", *more, output="bm25.jsonl")


def test_a_run_is_followed_by_the_text_of_its_queries(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranked = {"river": 9.0, "gone": 8.5, "minster": 8.0, "moon": 7.7, "kiel": 7.0}
    write_trec_run({"tower": ranked, "elsewhere": {"moon": 1.0}}, data / "a.trec", "tag")
    with caplog.at_level(logging.INFO):
        output = run(data, str(data / "a.trec"))
    tower, sea = lines_of(output)
    assert tower["negative_sources"] == [
        {"who": str(data / "a.trec"), "id": "kiel", "rank": 5, "score": 7.0}
    ]  # 7.7 is more than 0.95 times 8
    assert tower["positive_scores"] == [8.0]
    assert (sea["negative_passages"], sea["positive_scores"]) == ([], [None, None])
    assert "queries of the run that queries.jsonl lacks: 1 of 2" in caplog.text
    assert "documents of the run that the corpus lacks: 1 of 5, the first is 'gone'" in caplog.text
    assert "queries of the rows that the run does not rank: 1 of 2" in caplog.text


def test_a_positive_that_a_run_does_not_rank_bounds_no_share(data: Path) -> None:
    write_trec_run({"tower": {"river": 2.0, "moon": 1.0}}, data / "a.trec", "tag")
    with pytest.raises(SystemExit, match=r"no row gets a negative.*'max_share': 2"):
        run(data, str(data / "a.trec"))
    output = run(data, str(data / "a.trec"), "--max_share", "null")
    assert negatives(output) == ["river", "moon"]
    assert report_of(output)["rows_with_a_negative_above_a_positive"] == 1
    assert report_of(output)["median_of_best_positives"] is None


# --- again, and refused ------------------------------------------------------------------------


def test_the_same_command_writes_the_same_bytes_and_does_nothing_then(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = run(data)
    again = run(data, output="again.jsonl")
    assert again.read_bytes() == output.read_bytes()
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "again.jsonl",
        "again.jsonl.report.json",
        "out.jsonl",
        "out.jsonl.report.json",
    ]
    before = output.stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        run(data)
    assert output.stat().st_mtime_ns == before
    assert "nothing to do" in caplog.text
    output.unlink()  # killed between the two files
    run(data)
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.parametrize("change", ["flag", "rows", "corpus", "queries", "run"])
def test_an_output_of_other_settings_or_input_is_refused(data: Path, change: str) -> None:
    write_trec_run({"tower": {"minster": 2.0, "moon": 1.0}}, data / "a.trec", "tag")
    output, more = run(data, str(data / "a.trec")), []
    before = output.read_bytes()
    if change == "flag":
        more = ["--max_share", "0.9"]
    elif change == "rows":
        write_lines(data / "rows.jsonl", [TOWER])
    elif change == "corpus":
        write_corpus(data, DOCUMENTS | {"new": "A tower."})
    elif change == "queries":
        write_lines(data / "queries.jsonl", [{"_id": "tower", "text": SEA["query"]}])
    else:
        write_trec_run({"tower": {"minster": 3.0, "moon": 1.0}}, data / "a.trec", "tag")
    wanted = "max_share was 0.95, is 0.9" if change == "flag" else "checksum was"
    with pytest.raises(SystemExit, match=wanted):
        run(data, str(data / "a.trec"), *more)
    assert output.read_bytes() == before


def test_a_file_that_mining_has_not_written_is_never_overwritten(data: Path) -> None:
    before = (data / "rows.jsonl").read_bytes()
    arguments = ["--corpus", str(data), "--candidates", "bm25", "--input", str(data / "rows.jsonl")]
    with pytest.raises(SystemExit, match=r"rows.jsonl is there without its rows.jsonl.report.json"):
        main([*arguments, "--output", str(data / "rows.jsonl")])
    assert (data / "rows.jsonl").read_bytes() == before


def test_a_second_process_on_the_same_file_is_refused(data: Path) -> None:
    (data.parent / "made").mkdir()
    with (data.parent / "made" / ".out.jsonl.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="is being written by"):
            run(data)
        run(data, output="another.jsonl")


def documents(data: Path, **texts: str) -> None:
    write_corpus(data, texts)


def rows(data: Path, *records: Any) -> None:
    write_lines(data / "rows.jsonl", list(records))


@pytest.mark.parametrize(
    ("spoil", "more", "wanted"),
    [
        (lambda d: documents(d, only="Ulm."), (), "documents with text: 1; two at least"),
        (lambda d: documents(d, a=" ", b="b", c=""), (), "documents with text: 1"),
        (
            lambda d: documents(d, a="of the", b="it is"),
            (),
            "no document of the corpus has a token",
        ),
        (lambda d: documents(d, a="sun", b="star"), (), "no row gets a negative; candidates by"),
        (lambda d: rows(d), (), r"rows.jsonl: holds no rows"),
        (lambda d: rows(d, TOWER, {**TOWER, "query": " "}), (), r"rows.jsonl:2: 'query' is empty"),
        (lambda d: rows(d, {**TOWER, "positive_passages": [""]}), (), "item 0 of 'positive_pass"),
        (lambda d: (d / "corpus.jsonl").unlink(), (), r"corpus.jsonl is missing"),
        (lambda d: None, ("--ranks", "[5,2]"), "ranks must ascend"),
        (lambda d: None, ("--ranks", "[0,2]"), "ranks must be at least 1"),
        (lambda d: None, ("--seed", "-1"), "seed must be at least 0"),
        (lambda d: None, ("--max_share", "0"), "max_share must lie in"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing_behind(
    data: Path, spoil: Any, more: tuple[str, ...], wanted: str
) -> None:
    spoil(data)
    with pytest.raises(SystemExit, match=wanted):
        run(data, "bm25", *more)
    assert not (data.parent / "made").exists()


@pytest.mark.parametrize(
    ("ranked", "wanted"),
    [
        ({"tower": {"gone": 1.0}}, "documents of the run that the corpus lacks: 1 of 1"),
        ({"t0wer": {"moon": 1.0}}, "queries of the run that queries.jsonl lacks: 1 of 1"),
    ],
)
def test_a_run_of_another_corpus_is_refused(data: Path, ranked: Any, wanted: str) -> None:
    write_trec_run(ranked, data / "a.trec", "tag")
    with pytest.raises(SystemExit, match=f"{wanted}.*not one matches"):
        run(data, str(data / "a.trec"))
    assert not (data.parent / "made").exists()


def test_a_missing_library_is_named_with_its_extra(data: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.delitem(sys.modules, "laser_jax.mine.bm25", raising=False)
    with pytest.raises(SystemExit, match=r"needs bm25s: pip install 'laser-jax\[mine\]'"):
        run(data)


def test_candidates_that_are_nothing_are_named(data: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=r"gone.trec is no directory"):
        run(data, str(data / "gone.trec"))
