"""mteb's evaluation of a retriever against our own: the same rankings, the same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_jax.data.documents import Document, EvalQuery
from laser_jax.evaluate.beir import BeirDataset, read_queries
from laser_jax.evaluate.bright import INSTRUCTIONS
from laser_jax.evaluate.metrics import (
    evaluate_run,
    mean,
    without_excluded,
)
from laser_jax.evaluate.retrieval import latent, retrieval_runs
from laser_jax.inference.retriever import LatentRetriever
from laser_jax.search.trec import Run

mteb = pytest.importorskip("mteb", reason="mteb is absent: pip install laser-jax[mteb]")
datasets = pytest.importorskip("datasets")
retrieval_metrics = pytest.importorskip("mteb._evaluators.retrieval_metrics")
ours = pytest.importorskip("laser_jax.evaluate.mteb")
TaskMetadata, PromptType = mteb.TaskMetadata, mteb.types.PromptType
MtebRetriever, evaluate_task, find_tasks = ours.MtebRetriever, ours.evaluate_task, ours.find_tasks

TASK = "Given a scientific claim, retrieve documents that support or refute the claim"
NAME = "laser_jax/tiny"
STEPS = 2
METRICS = ("nDCG@10", "Recall@100", "MAP@100", "P@5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    directory = tmp_path_factory.mktemp("run") / "tiny"
    texts = ["The effect of a protein on the cells of mice.", TASK]
    write_model(directory, texts, vocab_size=300, layers=1, steps=STEPS)
    return directory


@pytest.fixture(scope="module")
def retriever(model: Path) -> LatentRetriever:
    return LatentRetriever.from_pretrained(model, batch_size=16, length_multiple=128)


def our_runs(
    retriever: LatentRetriever, dataset: BeirDataset, steps: list[int], **options: Any
) -> dict[str, Run]:
    return retrieval_runs(retriever.encoder, retriever.prompts, dataset, steps, **options)


# --- a task of our data ------------------------------------------------------------------------


def local_metadata(name: str, **more: Any) -> Any:
    fields: dict[str, Any] = {
        "name": name,
        "dataset": {"path": "local/data", "revision": "1"},
        "description": "A slice of our own data.",
        "reference": None,
        "type": "Retrieval",
        "category": "t2t",
        "modalities": ["text"],
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
        "main_score": "ndcg_at_10",
        "prompt": {"query": TASK},
    }
    empty = ["date", "domains", "task_subtypes", "license", "annotations_creators"]
    empty += ["dialect", "sample_creation", "bibtex_citation"]
    return TaskMetadata(**dict.fromkeys(empty), **(fields | more))


class SlicedScifact(mteb.abstasks.AbsTaskRetrieval):
    """Scifact's first queries, their documents and as many others, cut short."""

    metadata = local_metadata("LaserSlicedScifact")
    folder: Path

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        queries = list(read_queries(self.folder).values())[:40]
        lines = (self.folder / "qrels" / "test.tsv").read_text().splitlines()[1:]
        judged = [line.split("\t") for line in lines]
        ids = {query.id for query in queries}
        qrels: dict[str, dict[str, int]] = {}
        for query, document, grade in judged:
            if query in ids:
                qrels.setdefault(query, {})[document] = int(grade)
        gold = {document for grades in qrels.values() for document in grades}
        rows = list(map(json.loads, (self.folder / "corpus.jsonl").read_text().splitlines()))
        kept = [row for row in rows if row["_id"] in gold] + [
            row for row in rows if row["_id"] not in gold
        ][: 2 * len(gold)]
        self.dataset = {
            "default": {
                "test": {
                    "corpus": datasets.Dataset.from_list(
                        [
                            {"id": row["_id"], "title": row["title"], "text": row["text"][:40]}
                            for row in kept
                        ]
                    ),
                    "queries": datasets.Dataset.from_list(
                        [{"id": q.id, "text": q.text} for q in queries if q.id in qrels]
                    ),
                    "relevant_docs": qrels,
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True

    def as_ours(self) -> BeirDataset:
        split = self.dataset["default"]["test"]
        return BeirDataset(
            [Document(d["id"], f"{d['title']} {d['text']}".strip()) for d in split["corpus"]],
            {q["id"]: EvalQuery(q["id"], q["text"], TASK) for q in split["queries"]},
            split["relevant_docs"],
        )


@pytest.fixture(scope="module")
def scifact(shared_data: Path) -> SlicedScifact:
    SlicedScifact.folder = shared_data / "scifact"
    task = SlicedScifact()
    task.load_data()
    return task


def assert_same_ranking(run: Run, theirs: Run, depth: int) -> None:
    """The first documents of every query agree but for swaps of scores that are equal to 1e-5,
    which is what float32 leaves of products that are summed in another order."""
    assert run.keys() == theirs.keys()
    for query, scores in run.items():
        best = sorted(theirs[query], key=lambda d: (theirs[query][d], d), reverse=True)[:depth]
        for mine, other in zip(list(scores)[:depth], best, strict=True):
            assert scores[mine] == pytest.approx(theirs[query][other], abs=1e-5)


def test_mteb_ranks_and_scores_as_our_own_evaluator(
    retriever: LatentRetriever, scifact: SlicedScifact, tmp_path: Path, monkeypatch
) -> None:
    scores, evaluate = {}, mteb.evaluate
    for steps in (1, STEPS):
        model = MtebRetriever(retriever, name=NAME, num_thinking_steps=steps)
        folder = tmp_path / f"predictions {steps}"
        monkeypatch.setattr(mteb, "evaluate", partial(evaluate, prediction_folder=folder))
        (score,) = evaluate_task(model, scifact, tmp_path, batch_size=16)
        (file,) = folder.rglob("*_predictions.json")
        theirs = json.loads(file.read_text())["default"]["test"]
        dataset = scifact.as_ours()
        run = our_runs(retriever, dataset, [steps])[latent(steps)]
        assert_same_ranking(run, theirs, 10)
        mine, others = (mean(evaluate_run(r, dataset.qrels, METRICS)) for r in (run, theirs))
        assert mine["nDCG@10"] == pytest.approx(others["nDCG@10"], abs=1e-6)
        assert mine["nDCG@10"] > 0
        results = json.loads(result_file(tmp_path, scifact, steps).read_text())
        (values,) = results["scores"]["test"]
        # mteb rounds to five digits
        assert values["ndcg_at_10"] == round(others["nDCG@10"], 5)
        assert values["recall_at_100"] == round(others["Recall@100"], 5)
        assert values["map_at_100"] == round(others["MAP@100"], 5)
        assert values["precision_at_5"] == round(others["P@5"], 5)
        assert (score.score, score.nothing_excluded) == (values["ndcg_at_10"], None)
        scores[steps] = score.score
    assert scores[1] != scores[STEPS]


def result_file(output: Path, task: Any, steps: int) -> Path:
    """Where mteb looks for it; another K than the model's is an experiment."""
    folder = output / "results" / "laser_jax__tiny" / "no_revision_available"
    if steps != STEPS:
        folder /= f"experiments/num_thinking_steps_{steps}"
    return folder / f"{task.metadata.name}.json"


def test_what_is_in_the_cache_is_not_computed_again(
    retriever: LatentRetriever, scifact: SlicedScifact, tmp_path: Path
) -> None:
    calls: list[int] = []

    class Counting(MtebRetriever):
        def encode(self, inputs: Any, **options: Any) -> np.ndarray:
            calls.append(1)
            return super().encode(inputs, **options)

    model = Counting(retriever, name=NAME)
    first = evaluate_task(model, scifact, tmp_path)
    assert len(calls) == 2
    assert evaluate_task(model, scifact, tmp_path) == first
    assert len(calls) == 2


def test_vectors_are_those_of_the_retriever(
    retriever: LatentRetriever, scifact: SlicedScifact
) -> None:
    model = MtebRetriever(retriever, name=NAME)
    where: dict[str, Any] = {"task_metadata": scifact.metadata, "hf_split": "test"}
    batches = [{"text": ["Proteins fold."]}, {"text": ["Mice run.", "Cells divide."]}]
    texts = ["Proteins fold.", "Mice run.", "Cells divide."]
    documents = model.encode(batches, **where, hf_subset="default", prompt_type=PromptType.document)
    np.testing.assert_array_equal(documents, retriever.encode_document(texts))
    queries = model.encode(batches, **where, hf_subset="default", prompt_type=PromptType.query)
    np.testing.assert_array_equal(queries, retriever.encode_query(texts, instruction=TASK))
    np.testing.assert_allclose(
        model.similarity(queries, documents), queries @ documents.T, atol=1e-6
    )
    np.testing.assert_allclose(
        model.similarity_pairwise(queries, documents),
        np.diag(queries @ documents.T),
        atol=1e-6,
    )
    assert model.encode([], **where, hf_subset="default").shape == (0, 16)


def test_documents_keep_the_models_own_k_of_them(
    retriever: LatentRetriever, scifact: SlicedScifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(retriever.encoder.config, document_thinking_steps=1)
    model = MtebRetriever(retriever, name=NAME, num_thinking_steps=2)
    where: dict[str, Any] = {"task_metadata": scifact.metadata, "hf_split": "test"}
    where |= {"hf_subset": "default"}
    monkeypatch.setattr(retriever.encoder, "config", config)
    found = model.encode([{"text": ["Mice run."]}], **where, prompt_type=PromptType.document)
    wanted = retriever.encode_document(["Mice run."], num_thinking_steps=1)
    np.testing.assert_array_equal(found, wanted)
    queries = model.encode([{"text": ["Mice?"]}], **where, prompt_type=PromptType.query)
    longer = retriever.encode_query(["Mice?"], instruction=TASK, num_thinking_steps=2)
    np.testing.assert_array_equal(queries, longer)


# --- instructions ------------------------------------------------------------------------------


def test_every_task_of_bright_has_its_domains_instruction(retriever: LatentRetriever) -> None:
    model = MtebRetriever(retriever, name=NAME)
    tasks = [task.metadata for task in find_tasks("BRIGHT(v1.1)")]
    assert len(tasks) == 20
    given = {task.name: model.instruction_of(task, "default") for task in tasks}
    assert given["BrightTheoremQATheoremsRetrieval"] == INSTRUCTIONS["theoremqa_theorems"]
    assert given["BrightPonyLongRetrieval"] == INSTRUCTIONS["pony"]
    assert set(given.values()) == set(INSTRUCTIONS.values())
    for name in ("BRIGHT", "BRIGHT (long)"):
        (task,) = find_tasks(name)
        for domain in task.metadata.eval_langs:
            assert model.instruction_of(task.metadata, domain) == INSTRUCTIONS[domain]


def test_followir_has_one_instruction_and_other_tasks_have_mtebs(
    retriever: LatentRetriever,
) -> None:
    model = MtebRetriever(retriever, name=NAME)
    tasks = [task.metadata for task in find_tasks("FollowIR")]
    assert len(tasks) == 3
    assert {model.instruction_of(task, "default") for task in tasks} == {ours.FOLLOWIR_INSTRUCTION}
    (browse,) = find_tasks("BrowseCompPlusRetrieval")
    assert isinstance(browse.metadata.prompt, dict)
    assert model.instruction_of(browse.metadata, "gold_only") == browse.metadata.prompt["query"]
    own = MtebRetriever(retriever, name=NAME, instruction="Find it")
    assert own.instruction_of(tasks[0], "default") == "Find it"
    assert own.mteb_model_meta.experiment_kwargs == {"instruction": "Find it"}


def test_unknown_tasks_and_names_are_refused(retriever: LatentRetriever) -> None:
    with pytest.raises(ValueError, match=r"no benchmark or task of mteb: 'BRIGTH' not found\. Did"):
        find_tasks("BRIGTH")
    with pytest.raises(ValueError, match="organisation/model, got 'tiny'"):
        MtebRetriever(retriever, name="tiny")


def test_a_revision_is_of_the_weights_and_the_settings(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    assert ours.model_revision(other) == ours.model_revision(model)
    (other / "notes.txt").write_text("of no matter")
    assert ours.model_revision(other) == ours.model_revision(model)
    weights = next(other.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert ours.model_revision(other) != ours.model_revision(model)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.model", "merges.txt"])
def test_a_revision_is_of_the_files_that_make_the_prompts(model: Path, tmp_path, name) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    (other / name).write_text("changed")
    assert ours.model_revision(other) != ours.model_revision(model)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["Ulm", "Jena"], '"text" is a list of strings, .* not a list of str'),
        ({"text": ["Ulm"]}, "not a dict of str"),
        ([{"text": "Ulm"}], "every text is wanted, not a str"),
        ([{"text": {"Ulm": 1}}], "every text is wanted, not a dict"),
        ([{"text": ["Ulm", None]}], "text 1 is no string but None"),
    ],
)
def test_inputs_other_than_batches_of_texts_are_refused(retriever, inputs, message) -> None:
    model = MtebRetriever(retriever, name=NAME)
    with pytest.raises(ValueError, match=message):
        model.encode(
            inputs,
            task_metadata=SlicedScifact.metadata,
            hf_split="test",
            hf_subset="default",
            prompt_type=PromptType.document,
        )


# --- FollowIR ----------------------------------------------------------------------------------


INSTRUCTIONS_OF = {
    "og": "Documents about any effect are relevant.",
    "changed": "Only documents about effects on mice are relevant, cells are not.",
}


class LocalFollowIR(mteb.abstasks.AbsTaskRetrieval):
    """Queries under two instructions over listed candidates, as FollowIR's tasks are."""

    metadata = local_metadata(
        "LaserLocalFollowIR",
        type="InstructionReranking",
        main_score="p-MRR",
        prompt={"query": ours.FOLLOWIR_INSTRUCTION},
    )
    texts = tuple(f"The effect of protein {n} on the cells of {n} mice." for n in range(12))
    ids = tuple(f"q{n}-{kind}" for n in range(4) for kind in INSTRUCTIONS_OF)

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        documents = [f"d{n}" for n in range(len(self.texts))]
        # the even documents are relevant at first; a changed instruction leaves the first three
        qrels = {
            id_: {
                d: int(n % 2 == 0 and (n < 6 or id_.endswith("-og")))
                for n, d in enumerate(documents)
            }
            for id_ in self.ids
        }
        self.dataset = {
            "default": {
                "test": {
                    "corpus": datasets.Dataset.from_list(
                        [
                            {"id": d, "title": "", "text": text}
                            for d, text in zip(documents, self.texts, strict=True)
                        ]
                    ),
                    "queries": datasets.Dataset.from_list(
                        [
                            {
                                "id": id_,
                                "text": f"What does protein {id_[1]} do?",
                                "instruction": INSTRUCTIONS_OF[id_.split("-")[1]],
                            }
                            for id_ in self.ids
                        ]
                    ),
                    "relevant_docs": qrels,
                    "top_ranked": dict.fromkeys(self.ids, documents[:10]),
                }
            }
        }
        self.data_loaded = True

    def qrels(self, kind: str) -> dict[str, dict[str, int]]:
        judged = self.dataset["default"]["test"]["relevant_docs"]
        return {q.split("-")[0]: grades for q, grades in judged.items() if q.endswith(kind)}

    def changed_documents(self) -> dict[str, list[str]]:
        """Of each query, those that the changed instruction makes irrelevant."""
        original, changed = self.qrels("og"), self.qrels("changed")
        return {q: [d for d in of if of[d] > changed[q][d]] for q, of in original.items()}

    def task_specific_scores(
        self, scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str
    ) -> Any:
        return retrieval_metrics.evaluate_p_mrr_change(
            qrels, results, self.changed_documents(), self.k_values
        )


def test_followirs_p_mrr_is_that_of_our_own_runs(
    retriever: LatentRetriever, tmp_path: Path
) -> None:
    task = LocalFollowIR()
    task.load_data()
    (score,) = evaluate_task(MtebRetriever(retriever, name=NAME), task, tmp_path)
    documents = [Document(f"d{n}", text) for n, text in enumerate(task.texts)]
    runs = {}
    for kind, instruction in INSTRUCTIONS_OF.items():
        queries = {
            f"q{n}": EvalQuery(
                f"q{n}", f"What does protein {n} do? {instruction}", ours.FOLLOWIR_INSTRUCTION
            )
            for n in range(4)
        }
        dataset = BeirDataset(documents, queries, task.qrels(kind))
        run = our_runs(retriever, dataset, [STEPS])[latent(STEPS)]
        runs[kind] = without_excluded(run, {q: ["d10", "d11"] for q in run})
    changed = task.changed_documents()
    assert set(changed["q0"]) == {"d6", "d8", "d10"}
    named = [{f"{q}-{kind}": s for q, s in runs[kind].items()} for kind in ("og", "changed")]
    assert score.metric == "p-MRR"
    expected = retrieval_metrics.calculate_pmrr(*named, changed)
    assert score.score == pytest.approx(expected, abs=1e-6)
    assert score.score != 0
