"""The program over mteb's own tasks of BRIGHT, fed from a local copy, against our own evaluator."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_bright import write_json_lines

from laser_jax.evaluate.bright import INSTRUCTIONS, BrightCopy
from laser_jax.evaluate.metrics import evaluate_run, mean
from laser_jax.evaluate.retrieval import latent, query_inputs, rank_corpus, unrestricted
from laser_jax.evaluate.run import main
from laser_jax.files.claim import Claim
from laser_jax.inference.retriever import LatentRetriever

datasets = pytest.importorskip("datasets")
ours = pytest.importorskip("laser_jax.evaluate.mteb")
STEPS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    directory = tmp_path_factory.mktemp("run") / "tiny"
    texts = [f"Problem {n} asks for the root of a number." for n in range(9)]
    write_model(directory, texts, vocab_size=300, layers=1, steps=STEPS)
    return directory


@pytest.fixture(scope="module")
def retriever(model: Path) -> LatentRetriever:
    return LatentRetriever.from_pretrained(model, batch_size=16, length_multiple=128)


def write_domain(directory: Path, domain: str, excluded: int) -> None:
    """24 documents and 8 queries, of which each excludes `excluded` documents."""
    ids = [f"{domain} {n}.txt" for n in range(24)]
    contents = [f" Problem {n * n} asks for the root of {n}.\n" for n in range(24)]

    def excludes(q: int) -> list[str]:
        return [ids[(q + 1 + n) % 8 + 8 * (n % 2)] for n in range(excluded)]

    examples = [
        {
            "id": str(q),
            "query": f"What is the root of {q * q}?",
            "gold_ids": [ids[q], ids[q + 8]],
            "gold_ids_long": ["N/A"],
            "excluded_ids": excludes(q) or ["N/A"],
        }
        for q in range(8)
    ]
    write_json_lines(
        directory / "documents" / f"{domain}.jsonl",
        [{"id": id_, "content": text} for id_, text in zip(ids, contents, strict=True)],
    )
    write_json_lines(directory / "examples" / f"{domain}.jsonl", examples)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bright")
    for domain in INSTRUCTIONS:
        write_domain(directory, domain, excluded=6 if domain == "aops" else 0)
    return directory


@pytest.fixture
def local_hub(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mteb's tasks load from the copy."""

    def load(path: str, folder: str, *, split: str, **_: Any) -> Any:
        assert path in ("mteb/BRIGHT", "xlangai/BRIGHT")
        lines = (copy / folder / f"{split}.jsonl").read_text().splitlines()
        return datasets.Dataset.from_list([json.loads(line) for line in lines])

    monkeypatch.setattr(datasets, "load_dataset", load)


def our_scores(copy: Path, retriever: LatentRetriever, domain: str, steps: int) -> list[float]:
    """nDCG@10 with exclusions and without."""
    dataset = BrightCopy(copy).read(domain)
    encoder, prompts = retriever.encoder, retriever.prompts
    rows = [prompts.document(document.text) for document in dataset.documents]
    inputs = query_inputs(prompts, dataset, encoder.config, [steps])
    runs = rank_corpus(encoder, rows, dataset, inputs, nothing_excluded=True)
    names = (latent(steps), unrestricted(latent(steps)))
    return [mean(evaluate_run(runs[name], dataset.qrels))["nDCG@10"] for name in names]


def rows(text: str) -> dict[str, list[str]]:
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    return {row[0]: row[1:] for row in cells if len(row) == 4}


@pytest.mark.usefixtures("local_hub")
def test_bright_is_scored_with_exclusions_and_without_as_by_our_evaluator(
    model: Path,
    retriever: LatentRetriever,
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = "BrightAopsRetrieval, BrightBiologyRetrieval"
    where = ["mteb", "--model", str(model), "--output", str(tmp_path), "--tasks", tasks]
    main([*where, "--num_thinking_steps", "1", "--batch_size", "16"])
    scores = json.loads((tmp_path / "scores.json").read_text())
    printed = rows(capsys.readouterr().out)
    for name, domain in (("BrightAopsRetrieval", "aops"), ("BrightBiologyRetrieval", "biology")):
        (score,) = scores[name]
        ours = our_scores(copy, retriever, domain, 1)
        # mteb rounds to five digits
        assert [score["score"], score["nothing_excluded"]] == pytest.approx(ours, abs=6e-6)
        assert (ours[0] != ours[1]) == (domain == "aops")
        assert printed[name] == ["ndcg_at_10", *(f"{value:.4f}" for value in ours)]
    files = {path.parent.name for path in tmp_path.rglob("BrightAopsRetrieval.json")}
    assert files == {"num_thinking_steps_1", "exclusions_none__num_thinking_steps_1"}


@pytest.mark.usefixtures("local_hub")
@pytest.mark.parametrize("preset", ["official", "official-bare"])
def test_a_released_model_is_scored_by_the_vectors_of_the_retriever(
    model: Path, copy: Path, tmp_path: Path, preset: str
) -> None:
    released = tmp_path / "laser"
    shutil.copytree(model, released)
    (released / "laser_config.json").unlink()
    output, task = tmp_path / "out", "BrightPonyRetrieval"
    where = ["mteb", "--model", str(released), "--output", str(output), "--tasks", task]
    main([*where, "--preset", preset])
    (score,) = json.loads((output / "scores.json").read_text())[task]
    retriever = LatentRetriever.from_pretrained(released, preset=preset)
    assert score["score"] == pytest.approx(our_scores(copy, retriever, "pony", 3)[0], abs=6e-6)
    (file,) = output.rglob(f"{task}.json")
    assert file.parent.name == f"preset_{preset}"


# mteb recommends BRIGHT(v1.1), in several warnings
@pytest.mark.filterwarnings("ignore:This task contains wrong prompts:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The task 'BrightRetrieval' is superseded:UserWarning")
@pytest.mark.usefixtures("local_hub")
def test_the_first_bright_excludes_nothing(
    model: Path,
    retriever: LatentRetriever,
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["mteb", "--model", str(model), "--output", str(tmp_path), "--tasks", "BRIGHT"])
    scores = {
        score["subset"]: score
        for score in json.loads((tmp_path / "scores.json").read_text())["BRIGHT"]
    }
    assert set(scores) == set(INSTRUCTIONS)
    for domain in ("aops", "pony"):
        _, free = our_scores(copy, retriever, domain, STEPS)
        assert scores[domain]["score"] == pytest.approx(free, abs=6e-6)
        assert scores[domain]["nothing_excluded"] == scores[domain]["score"]
    average = sum(score["score"] for score in scores.values()) / 12
    printed = rows(capsys.readouterr().out)
    assert printed["mean of 12, BRIGHT, standard"] == ["ndcg_at_10", *[f"{average:.4f}"] * 2]


def test_names_are_cut_at_commas_outside_brackets() -> None:
    assert ours.task_names("BRIGHT(v1.1), MTEB(eng, v2),FollowIR") == [
        "BRIGHT(v1.1)",
        "MTEB(eng, v2)",
        "FollowIR",
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "BRIGTH"], "no benchmark or task of mteb: 'BRIGTH' not found"),
        (["--tasks", " ,"], "tasks must name one task at least"),
        (["--tasks", "FollowIR", "--num_thinking_steps", "0"], "steps must be at least 1, got 0"),
        (
            ["--tasks", "FollowIR", "--max_length", "99999"],
            "take 100511 positions, and the model has 4096",
        ),
        (["--tasks", "FollowIR", "--devices", "99"], "devices is 99, and this process has 8"),
        (["--tasks", "FollowIR", "--model", "/absent/model"], "/absent/model is no directory"),
    ],
)
def test_bad_options_end_the_program_before_anything_is_written(
    model: Path,
    tmp_path: Path,
    more: list[str],
    message: str,
) -> None:
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["mteb", "--model", str(model), "--output", str(output), *more])
    assert not output.exists()


def test_a_directory_that_another_program_writes_is_refused(model: Path, tmp_path: Path) -> None:
    where = ["mteb", "--model", str(model), "--output", str(tmp_path), "--tasks", "FollowIR"]
    with (
        Claim(tmp_path, "scores.json", lambda scores: []),
        pytest.raises(SystemExit, match="is being written by process"),
    ):
        main(where)


def test_without_mteb_the_extra_is_named(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.delitem(sys.modules, "laser_jax.evaluate.mteb", raising=False)
    with pytest.raises(SystemExit, match=r"error: .*pip install 'laser-jax\[mteb\]'"):
        main(["mteb", "--model", str(model), "--output", str(tmp_path), "--tasks", "FollowIR"])
