"""The synthetic world: what the split holds out, what the texts give away, what the files say."""

from __future__ import annotations

import collections
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_jax.config import ConfigError
from laser_jax.data.sources import open_source
from laser_jax.files.reading import read_yaml
from laser_jax.quickstart.world import (
    INSTRUCTION,
    PLACE_NAMES,
    RELATION_NAMES,
    SEPARATOR,
    World,
    WorldConfig,
    build_roads,
    build_world,
    hard_negatives,
    world_files,
    write_world,
)
from laser_jax.settings import from_dict

QUERY = re.compile(r"From (\w+), take (.+)\.")
TINY = WorldConfig(num_places=8, num_relations=3, num_dev_queries=10, num_test_queries=20)
HARD = replace(TINY, num_lm_walks=6, num_train_queries=12, documents_per_place=3)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(WorldConfig())


def read_query(text: str) -> tuple[str, tuple[str, ...]]:
    """(start, relations) as names, from the text alone."""
    match = QUERY.fullmatch(text)
    assert match is not None, text
    return match[1], tuple(way.removeprefix("the ") for way in match[2].split(", then "))


def walk_by_table(world: World, text: str) -> list[str]:
    """The places after the start that the roads give for a query's text."""
    start, ways = read_query(text)
    place, reached = world.places.index(start), []
    for way in ways:
        place = int(world.successors_RP[world.relations.index(way), place])
        reached.append(world.places[place])
    return reached


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\w+", text)) & set(PLACE_NAMES)


# --- names and roads -------------------------------------------------------------------------


def test_no_name_is_part_of_another() -> None:
    assert len(PLACE_NAMES) >= 64
    for names in (PLACE_NAMES, RELATION_NAMES):
        assert all(a not in b for a, b in itertools.permutations(names, 2))
    assert all(name.isalpha() and name == name.capitalize() for name in PLACE_NAMES)


@pytest.mark.parametrize(("num_places", "num_relations"), [(4, 3), (8, 3), (24, 6), (72, 12)])
def test_every_relation_is_a_permutation_that_agrees_with_no_other(
    num_places: int, num_relations: int
) -> None:
    for seed in range(5):
        roads_RP = build_roads(num_places, num_relations, np.random.default_rng(seed))
        stay_P = np.arange(num_places)
        assert (np.sort(roads_RP, axis=1) == stay_P[None]).all()
        for a_P, b_P in itertools.combinations([stay_P, *roads_RP], 2):
            assert (a_P != b_P).all()


def test_roads_do_not_commute(world: World) -> None:
    first_P, second_P = world.successors_RP[:2]
    assert (first_P[second_P] != second_P[first_P]).mean() > 0.5


# --- seeds -----------------------------------------------------------------------------------


def test_equal_seeds_give_equal_bytes_and_others_do_not() -> None:
    same, other = WorldConfig(seed=3), WorldConfig(seed=4)
    files = world_files(build_world(same))
    assert world_files(build_world(same)) == files
    changed = world_files(build_world(other))
    assert all(changed[name] != files[name] for name in files)


def test_test_queries_stay_the_same_while_training_grows() -> None:
    small = build_world(WorldConfig(train_share=0.1))
    large = build_world(WorldConfig(train_share=0.4))
    assert small.test == large.test
    assert small.dev == large.dev
    assert {row.query for row in small.train} < {row.query for row in large.train}


# --- what is held out ------------------------------------------------------------------------


def test_held_out_compositions_are_in_no_training_query_and_no_lm_reasoning(world: World) -> None:
    dev, test = ({query.text for query in queries} for queries in (world.dev, world.test))
    trained = {row.query for row in world.train} | {pair.text for pair in world.lm}
    assert not dev & test
    assert not (dev | test) & trained
    # The text names the composition fully, so disjoint texts are disjoint compositions.
    assert len({read_query(text) for text in dev | test | trained}) == len(dev | test | trained)
    assert all(len(read_query(text)[1]) == world.config.hops for text in dev | test)


def test_held_out_chains_are_not_spelled_out_by_lm_texts(world: World) -> None:
    longest = [pair for pair in world.lm if len(pair.walk.relations) == 3]
    assert longest
    spelled = {(pair.walk.places, pair.walk.relations) for pair in longest}
    for query in (*world.dev, *world.test):
        assert (query.walk.places, query.walk.relations) not in spelled
        assert all(query.reasoning not in text for text in world.facts)


def test_every_hop_of_a_test_query_is_an_lm_fact(world: World) -> None:
    facts = set(world.facts)
    for query in (*world.dev, *world.test):
        start, ways = read_query(query.text)
        route = [start, *walk_by_table(world, query.text)]
        for way, (here, there) in zip(ways, itertools.pairwise(route), strict=True):
            assert f"The {way} leads from {here} to {there}." in facts
            assert f"From {here}, the {way} goes to {there}." in facts


def test_all_shorter_walks_and_all_train_walks_are_lm_reasonings(world: World) -> None:
    lengths = collections.Counter(len(pair.walk.relations) for pair in world.lm)
    assert lengths[1] == world.successors_RP.size
    assert lengths[3] == len(world.train_walks) == len(world.train)
    written = {(pair.text, pair.reasoning) for pair in world.lm}
    assert {(row.query, row.reasoning_query) for row in world.train} < written


def test_a_hard_world_spells_few_walks_out_and_labels_few_with_one_of_several_documents() -> None:
    world, easy = build_world(HARD), build_world(TINY)
    assert len(world.train) == HARD.num_train_queries < len(easy.train)
    assert world.train_walks == easy.train_walks[: len(world.train)]
    unread = set(easy.lm_walks) - set(world.lm_walks)
    assert (len(world.lm_walks), unread) == (len(world.lm), set(easy.train_walks[:-6]))
    assert (world.dev_walks, world.documents[:8]) == (easy.dev_walks, easy.documents)
    assert len(world.documents) == len({id_ for id_, _ in world.documents}) == 24
    labels = collections.Counter()
    for row, walk in zip(world.train, world.train_walks, strict=True):
        texts = [text for _, text in world.described(walk.answer)]
        assert all(names_in(text) == {world.places[walk.answer]} for text in texts)
        assert not set(texts) & set(row.negative_passages)
        labels[texts.index(*row.positive_passages)] += 1
    assert set(labels) == {0, 1, 2}
    for query in (*world.dev, *world.test):
        name = world.places[query.walk.answer].lower()
        assert query.gold == (name, f"{name}-2", f"{name}-3")


def test_the_config_of_the_hard_world_is_one() -> None:
    file = Path(__file__).parents[1] / "configs" / "world_hard.yaml"
    config = from_dict(WorldConfig, read_yaml(file), source=str(file))
    world = build_world(config)
    assert (len(world.train), config.num_places) == (config.num_train_queries, 20)
    assert len([walk for walk in world.lm_walks if len(walk.relations) == 3]) == config.num_lm_walks


# --- what the texts say ----------------------------------------------------------------------


def test_the_gold_document_follows_from_the_roads(world: World) -> None:
    text_of = dict(world.documents)
    for query in (*world.dev, *world.test):
        *bridges, answer = walk_by_table(world, query.text)
        assert query.gold == (answer.lower(),)
        assert [world.places[place] for place in query.walk.places[1:]] == [*bridges, answer]
    for row in world.train:
        answer = walk_by_table(world, row.query)[-1]
        assert row.positive_passages == (text_of[answer.lower()],)
        assert row.prompt == INSTRUCTION


def test_a_query_names_no_place_but_its_start(world: World) -> None:
    for text in (*(q.text for q in (*world.dev, *world.test)), *(r.query for r in world.train)):
        start, _ = read_query(text)
        assert names_in(text) == {start}
        assert start not in walk_by_table(world, text)


def test_a_reasoning_names_one_place_a_segment_and_every_segment_ends_alike(world: World) -> None:
    for row in world.train:
        *segments, rest = row.reasoning_query.split(SEPARATOR)
        assert segments == [f" {place}." for place in walk_by_table(world, row.query)]
        assert rest == ""


def test_a_document_names_its_own_place_and_no_road(world: World) -> None:
    assert [doc_id for doc_id, _ in world.documents] == [name.lower() for name in world.places]
    for name, (_, text) in zip(world.places, world.documents, strict=True):
        assert names_in(text) == {name}
        assert not any(relation in text for relation in RELATION_NAMES)


def test_bridges_and_start_are_hard_negatives_and_never_the_positive(world: World) -> None:
    text_of = dict(world.documents)
    for row in world.train:
        start, _ = read_query(row.query)
        *bridges, _ = walk_by_table(world, row.query)
        nearest_first = [text_of[name.lower()] for name in (*reversed(bridges), start)]
        assert list(row.negative_passages[: len(nearest_first)]) == nearest_first
        assert len(set(row.negative_passages)) == len(row.negative_passages)
        assert len(row.negative_passages) == world.config.num_negatives
        assert not set(row.positive_passages) & set(row.negative_passages)


def test_other_hard_negatives_are_one_wrong_hop_away(world: World) -> None:
    for query in world.test[:50]:
        negatives = hard_negatives(query.walk, world.successors_RP, 24, seed=0)
        one_wrong = set()
        for hop, wrong in itertools.product(range(3), range(len(world.relations))):
            place = query.walk.places[0]
            for i, relation in enumerate(query.walk.relations):
                place = int(world.successors_RP[wrong if i == hop else relation, place])
            one_wrong.add(place)
        assert set(negatives[3:]) == one_wrong - set(query.walk.places)


def test_answers_are_balanced(world: World) -> None:
    by_length = collections.defaultdict(collections.Counter)
    for row in world.train:
        by_length[len(read_query(row.query)[1])][row.positive_passages] += 1
    counts = [
        by_length[3],
        collections.Counter(query.gold for query in world.test),
        collections.Counter(query.gold for query in world.dev),
    ]
    for count in counts:
        assert len(count) == len(world.places)
        assert max(count.values()) - min(count.values()) <= 2


# --- the settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("num_places", {"num_places": 4}),
        ("num_places", {"num_places": 200}),
        ("num_relations", {"num_relations": 1}),
        ("hops", {"hops": 0}),
        ("train_share", {"train_share": 1.0}),
        ("num_test_queries", {"num_test_queries": 0}),
        ("num_negatives", {"num_negatives": 2}),
        ("seed", {"seed": -1}),
    ],
)
def test_impossible_settings_are_refused_by_name(key: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"world\.{key} "):
        WorldConfig(**settings)


def test_a_split_without_queries_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 train"):
        build_world(WorldConfig(num_places=5, num_relations=2, train_share=1e-3))


# --- the files -------------------------------------------------------------------------------


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("config", [TINY, HARD], ids=["as it was", "hard"])
def test_files_are_beir_and_laser_rows(tmp_path: Path, config: WorldConfig) -> None:
    world = build_world(config)
    write_world(world, tmp_path / "world")
    corpus = read_jsonl(tmp_path / "world/corpus.jsonl")
    assert [(row["_id"], row["text"]) for row in corpus] == list(world.documents)
    assert all(set(row) == {"_id", "title", "text"} for row in corpus)

    queries = {row["_id"]: row for row in read_jsonl(tmp_path / "world/queries.jsonl")}
    judged = []
    for split, expected in (("dev", world.dev), ("test", world.test)):
        header, *lines = (tmp_path / f"world/qrels/{split}.tsv").read_text().splitlines()
        assert header == "query-id\tcorpus-id\tscore"
        labels = [[q.query_id, id_, "1"] for q in expected for id_ in q.gold]
        assert [line.split("\t") for line in lines] == labels
        for query in expected:
            assert queries[query.query_id] == {
                "_id": query.query_id,
                "text": query.text,
                "instruction": INSTRUCTION,
                "reasoning": query.reasoning,
            }
        judged += [query.query_id for query in expected]
    assert judged == list(queries)

    assert list(open_source(tmp_path / "world/train.jsonl")) == list(world.train)
    passages = {text for _, text in world.documents}
    for row in world.train:
        assert {*row.positive_passages, *row.negative_passages} <= passages

    lm = read_jsonl(tmp_path / "world/lm.jsonl")
    assert [row["text"] for row in lm if "text" in row] == [
        *world.facts,
        *(text for _, text in world.documents),
    ]
    assert [row for row in lm if "query" in row] == [
        {"prompt": INSTRUCTION, "query": pair.text, "reasoning": pair.reasoning}
        for pair in world.lm
    ]
    assert [row for row in lm if "document" in row] == [
        {"document": text, "reasoning": f" {name}.{SEPARATOR}"}
        for place, name in enumerate(world.places)
        for _, text in world.described(place)
    ]
    assert all(len({"text", "query", "document"} & set(row)) == 1 for row in lm)


def test_writing_again_replaces_the_world_and_leaves_nothing_else(tmp_path: Path) -> None:
    first, second = build_world(TINY), build_world(WorldConfig(seed=1))
    target = tmp_path / "deep" / "world"
    for world in (first, second, second):
        write_world(world, target)
        found = {
            path.relative_to(target).as_posix(): path.read_text(encoding="utf-8")
            for path in target.rglob("*")
            if path.is_file()
        }
        assert found == world_files(world)
    assert [path.name for path in target.parent.iterdir()] == ["world"]


def test_a_failed_write_keeps_the_world_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "world"
    write_world(build_world(TINY), target)
    before = (target / "train.jsonl").read_bytes()

    def disk_full(path: Path, content: bytes) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_world(build_world(WorldConfig(seed=1)), target)
    assert (target / "train.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        write_world(build_world(TINY), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
