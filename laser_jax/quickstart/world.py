"""The synthetic world: places joined by roads, and questions whose answer has to be walked to.

A relation (the ferry, the salt trail, ...) sends every place to one other place. A query names a
start and the relations to take; its gold document describes the place at the end of the walk and
says nothing about roads, so no word of the query helps to find it: the facts must be known by
heart and composed. Walks of the longest length are split by composition, which makes the dev and
test queries combinations that no training text has spelled out, over facts that all of them hold.

Everything follows from `WorldConfig`, its seed included. Plain text only: tokens come later.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from laser_jax.config import ConfigError
from laser_jax.data.schema import TrainingRow

INSTRUCTION = "Find the place that is reached"
SEPARATOR = "\n\n"

# No name is a prefix of another, so a name in a text is never the start of a longer one.
PLACE_NAMES = (
    *("Arden", "Brill", "Corvale", "Dunmere", "Elsware", "Farrowby", "Galdern", "Hexley"),
    *("Ivermoor", "Jorvane", "Kelstow", "Lorrim", "Marwend", "Nethering", "Ostrell", "Penhallen"),
    *("Quillon", "Rathmoor", "Selwyck", "Tarnby", "Ulverdale", "Varnholt", "Westrell", "Yarrock"),
    *("Zelmont", "Ambry", "Bascarne", "Cole", "Dorrance", "Estwyn", "Fenlock", "Grimsel"),
    *("Hargill", "Inverlee", "Jasperly", "Kindrick", "Lanmoor", "Mossgate", "Norrell", "Oakmere"),
    *("Pellow", "Quenby", "Ravenby", "Stanvere", "Thornlea", "Umberley", "Vesprell", "Wolden"),
    *("Yelvane", "Zennick", "Aldermay", "Birchall", "Crandon", "Dunn", "Emberly", "Foxholm"),
    *("Glenmarch", "Holvane", "Islewick", "Jessamy", "Kestrin", "Lydgate", "Merrow", "Nymphal"),
    *("Orrin", "Pridwell", "Quarley", "Rosmere", "Swandale", "Tolliver", "Underhay", "Vintry"),
)
RELATION_NAMES = (
    *("north road", "ferry", "old canal", "salt trail", "rail line", "mountain path"),
    *("coast road", "forest track", "tram line", "cable car", "sheep walk", "post route"),
)

_FACTS = (
    "The {relation} leads from {start} to {end}.",
    "From {start}, the {relation} goes to {end}.",
    "Take the {relation} from {start} and you reach {end}.",
    "Whoever leaves {start} by the {relation} comes to {end}.",
)
_DESCRIPTION = "{kind} called {name}, known for its {craft} and its {sight}."
_KINDS = (
    *("A market town", "A quiet village", "A walled city", "A fishing town", "A hill town"),
    *("A mining town", "A farming village", "A university town", "A garrison town", "A spa town"),
)
_CRAFTS = (
    *("glass workers", "bakers", "clock makers", "weavers", "potters", "boat builders", "printers"),
    *("bee keepers", "violin makers", "silver smiths", "cheese makers", "paper mills"),
)
_SIGHTS = (
    *("grey stone bridge", "twin towers", "tall lighthouse", "round church", "painted houses"),
    *("wide square", "ruined castle", "apple orchards", "hot springs", "long town wall"),
    *("wind mills", "great library"),
)
# Each kind of choice draws from a stream of its own: a change of one leaves the others as they are.
_NAME_STREAM, _ROAD_STREAM, _DESCRIPTION_STREAM, _SPLIT_STREAM, _NEGATIVE_STREAM = range(5)


@dataclass(frozen=True)
class WorldConfig:
    """The size of the world and what of it is shown in training."""

    num_places: int = 24
    num_relations: int = 6
    hops: int = 3
    """The length of dev and test walks, and of training walks unless `shorter_hops` adds others."""
    shorter_hops: tuple[int, ...] = ()
    """Shorter walks that become training queries too, all of each length (up to the cap)."""
    train_share: float = 0.3
    """The share of the walks of length `hops` that training may spell out."""
    num_train_queries: int | None = None
    """Caps the training queries of each length. The LM reasonings keep all training walks."""
    num_dev_queries: int = 200
    num_test_queries: int = 500
    num_negatives: int = 6
    """Hard negatives of a training query: start and bridges, then places one wrong hop away. Fewer
    where a small world has no more of them."""
    reasoning_style: Literal["short", "sentence"] = "short"
    """One segment a hop: `short` names the place reached, `sentence` the whole fact."""
    final_separator: bool = False
    """End the last segment with the separator as well, so that every segment ends alike."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.hops >= 1, f"world.hops must be at least 1, got {self.hops}")
        smallest = max(self.hops + 2, self.num_relations + 1)
        _require(
            smallest <= self.num_places <= len(PLACE_NAMES),
            f"world.num_places must lie in [{smallest}, {len(PLACE_NAMES)}] for walks of "
            f"{self.hops} hops over {self.num_relations} relations, got {self.num_places}",
        )
        _require(
            2 <= self.num_relations <= len(RELATION_NAMES),
            f"world.num_relations must lie in [2, {len(RELATION_NAMES)}], got {self.num_relations}",
        )
        _require(
            all(1 <= n < self.hops for n in self.shorter_hops)
            and len(set(self.shorter_hops)) == len(self.shorter_hops),
            f"world.shorter_hops must hold different lengths from 1 to {self.hops - 1}, got "
            f"{list(self.shorter_hops)}",
        )
        _require(
            0 < self.train_share < 1,
            f"world.train_share must lie between 0 and 1, got {self.train_share}",
        )
        _require(
            self.num_train_queries is None or self.num_train_queries >= 1,
            f"world.num_train_queries must be at least 1 or null, got {self.num_train_queries}",
        )
        _require(self.seed >= 0, f"world.seed must not be negative, got {self.seed}")
        for name in ("num_dev_queries", "num_test_queries"):
            value = getattr(self, name)
            _require(value >= 1, f"world.{name} must be at least 1, got {value}")
        _require(
            self.num_negatives >= self.hops,
            f"world.num_negatives must be at least {self.hops} (the start and every bridge of a "
            f"{self.hops}-hop walk), got {self.num_negatives}",
        )
        _require(
            self.reasoning_style in ("short", "sentence"),
            f"world.reasoning_style must be 'short' or 'sentence', got {self.reasoning_style!r}",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class Walk:
    """A composition by index: `relations[i]` leads from `places[i]` to `places[i + 1]`.

    Its places all differ, so the answer is neither the start nor a bridge.
    """

    places: tuple[int, ...]
    relations: tuple[int, ...]

    @property
    def answer(self) -> int:
        return self.places[-1]


@dataclass(frozen=True)
class EvalQuery:
    """A dev or test query. Places are given by document id."""

    query_id: str
    text: str
    reasoning: str
    gold: str
    bridges: tuple[str, ...]
    hops: int
    walk: Walk


@dataclass(frozen=True)
class WrittenReasoning:
    """A query and its chain of thought, for the language-model stage."""

    query: str
    reasoning: str
    walk: Walk


@dataclass(frozen=True)
class LmDocuments:
    """What the backbone reads before it learns to retrieve."""

    facts: tuple[str, ...]
    """Every fact in every paraphrase, then the documents."""
    reasonings: tuple[WrittenReasoning, ...]
    """All walks shorter than `hops`, then the training walks of length `hops`."""
    num_train_compositions: int
    """How many of the reasonings are of length `hops`."""


@dataclass(frozen=True, eq=False)
class World:
    """Places, roads and all texts about them."""

    config: WorldConfig
    places: tuple[str, ...]
    relations: tuple[str, ...]
    successors_RP: NDArray[np.int64]
    """`[R, P]`, read-only: relation r leads from place p to place `successors_RP[r, p]`."""
    documents: tuple[tuple[str, str], ...]
    """(id, text) of each place, in the order of `places`; the id is the lower-case name."""
    train: tuple[TrainingRow, ...]
    dev: tuple[EvalQuery, ...]
    test: tuple[EvalQuery, ...]
    lm: LmDocuments


# --- the roads -------------------------------------------------------------------------------


def build_roads(num_places: int, num_relations: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Random relations: permutations without fixed points, no two of which agree anywhere.

    Each is a perfect matching of places to the ends that no earlier relation took from them. That
    bipartite graph is regular, so there is a matching for up to P - 1 relations.

    Returns:
        int64 `[R, P]`: where relation r leads from place p.
    """
    free_PP = ~np.eye(num_places, dtype=bool)
    successors_RP = np.empty((num_relations, num_places), np.int64)
    for successor_P in successors_RP:
        ends = [rng.permutation(np.flatnonzero(free_P)).tolist() for free_P in free_PP]
        came_from: dict[int, int] = {}
        for place in rng.permutation(num_places).tolist():
            _augment(place, ends, came_from, set())
        for end, place in came_from.items():
            successor_P[place] = end
            free_PP[place, end] = False
    return successors_RP


def _augment(place: int, ends: list[list[int]], came_from: dict[int, int], seen: set[int]) -> bool:
    """Kuhn's algorithm: finds `place` an end, moving earlier places to other ends if need be."""
    for end in ends[place]:
        if end in seen:
            continue
        seen.add(end)
        if end not in came_from or _augment(came_from[end], ends, came_from, seen):
            came_from[end] = place
            return True
    return False


def enumerate_walks(successors_RP: NDArray[np.int64], hops: int) -> list[Walk]:
    """Every walk of `hops` hops that visits no place twice, ordered by start and relations."""
    num_relations, num_places = successors_RP.shape
    table = successors_RP.tolist()
    walks = []
    for start in range(num_places):
        for relations in itertools.product(range(num_relations), repeat=hops):
            places = (start, *_follow(table, start, relations))
            if len(set(places)) == hops + 1:
                walks.append(Walk(places, relations))
    return walks


def _follow(table: list[list[int]], start: int, relations: Iterable[int]) -> tuple[int, ...]:
    places, place = [], start
    for relation in relations:
        place = table[relation][place]
        places.append(place)
    return tuple(places)


def _balanced_order(walks: Sequence[Walk], rng: np.random.Generator) -> list[Walk]:
    """Shuffles the walks into rounds that name every answer once, so any prefix is balanced."""
    by_answer: dict[int, list[Walk]] = {}
    for index in rng.permutation(len(walks)).tolist():
        by_answer.setdefault(walks[index].answer, []).append(walks[index])
    ordered = []
    for round_ in itertools.zip_longest(*by_answer.values()):
        present = [walk for walk in round_ if walk is not None]
        ordered.extend(present[i] for i in rng.permutation(len(present)).tolist())
    return ordered


# --- the texts -------------------------------------------------------------------------------


def _describe(places: Sequence[str], rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
    parts = {
        "kind": _KINDS,
        "craft": _CRAFTS,
        "sight": _SIGHTS,
    }
    documents = []
    for name in places:
        drawn = {part: choices[rng.integers(len(choices))] for part, choices in parts.items()}
        documents.append((name.lower(), _DESCRIPTION.format(name=name, **drawn)))
    return tuple(documents)


def query_text(walk: Walk, places: Sequence[str], relations: Sequence[str]) -> str:
    """The question: start and relations by name, neither bridge nor answer."""
    ways = ", then ".join(f"the {relations[r]}" for r in walk.relations)
    return f"From {places[walk.places[0]]}, take {ways}."


def reasoning_text(
    walk: Walk, places: Sequence[str], relations: Sequence[str], config: WorldConfig
) -> str:
    """The chain of thought: one segment a hop, the last of which names the answer."""
    if config.reasoning_style == "short":
        # the blank makes a name the same token here as in the middle of a sentence
        segments = [f" {places[end]}." for end in walk.places[1:]]
    else:
        segments = [
            _FACTS[0].format(relation=relations[r], start=places[start], end=places[end])
            for r, (start, end) in zip(walk.relations, itertools.pairwise(walk.places), strict=True)
        ]
    return SEPARATOR.join(segments) + (SEPARATOR if config.final_separator else "")


def hard_negatives(
    walk: Walk, successors_RP: NDArray[np.int64], num_negatives: int, seed: int
) -> tuple[int, ...]:
    """The places that a retriever which walks badly would return, never the answer.

    First the bridges from the last to the first, then the start, then ends of the walks that
    differ in one relation, in random order. Two relations never agree and each is one-to-one, so
    such a walk cannot end at the answer.
    """
    table = successors_RP.tolist()
    wrong = [
        _follow(table, walk.places[0], (*walk.relations[:i], r, *walk.relations[i + 1 :]))[-1]
        for i in range(len(walk.relations))
        for r in range(len(table))
        if r != walk.relations[i]
    ]
    # Seeded by the walk itself: the same walk has the same negatives whatever else is trained.
    rng = np.random.default_rng([seed, _NEGATIVE_STREAM, walk.places[0], *walk.relations])
    shuffled = [wrong[i] for i in rng.permutation(len(wrong)).tolist()]
    return tuple(dict.fromkeys([*walk.places[-2::-1], *shuffled]))[:num_negatives]


def lm_documents(
    places: Sequence[str],
    relations: Sequence[str],
    successors_RP: NDArray[np.int64],
    documents: Sequence[tuple[str, str]],
    train_walks: Sequence[Walk],
    config: WorldConfig,
) -> LmDocuments:
    """The texts of the language-model stage: facts, documents and written reasonings."""
    facts = [
        template.format(relation=relations[r], start=places[start], end=places[end])
        for r, successor_P in enumerate(successors_RP.tolist())
        for start, end in enumerate(successor_P)
        for template in _FACTS
    ]
    shorter = [w for hops in range(1, config.hops) for w in enumerate_walks(successors_RP, hops)]
    reasonings = [
        WrittenReasoning(
            query_text(walk, places, relations),
            reasoning_text(walk, places, relations, config),
            walk,
        )
        for walk in (*shorter, *train_walks)
    ]
    return LmDocuments(
        facts=(*facts, *(text for _, text in documents)),
        reasonings=tuple(reasonings),
        num_train_compositions=len(train_walks),
    )


# --- the world -------------------------------------------------------------------------------


def build_world(config: WorldConfig) -> World:
    """The world of `config`; equal configs give equal worlds.

    Dev and test walks come first in the balanced order, so they stay the same while `train_share`
    varies, as long as their caps are met.

    Raises:
        ConfigError: when the split leaves no training, dev or test walk.
    """

    def stream(number: int, *more: int) -> np.random.Generator:
        return np.random.default_rng([config.seed, number, *more])

    names = stream(_NAME_STREAM).permutation(len(PLACE_NAMES))[: config.num_places]
    places = tuple(PLACE_NAMES[i] for i in names.tolist())
    relations = RELATION_NAMES[: config.num_relations]
    successors_RP = build_roads(config.num_places, config.num_relations, stream(_ROAD_STREAM))
    successors_RP.setflags(write=False)
    documents = _describe(places, stream(_DESCRIPTION_STREAM))

    def ordered_walks(hops: int) -> list[Walk]:
        return _balanced_order(enumerate_walks(successors_RP, hops), stream(_SPLIT_STREAM, hops))

    walks = ordered_walks(config.hops)
    num_train = round(config.train_share * len(walks))
    num_held_out = len(walks) - num_train
    num_dev = min(config.num_dev_queries, num_held_out // 4)
    num_test = min(config.num_test_queries, num_held_out - num_dev)
    _require(
        min(num_train, num_dev, num_test) >= 1,
        f"world: {len(walks)} walks of {config.hops} hops with train_share {config.train_share} "
        f"split into {num_train} train, {num_dev} dev and {num_test} test; more places or "
        "relations are wanted",
    )
    num_eval = num_test + num_dev
    test_walks, dev_walks = walks[:num_test], walks[num_test:num_eval]
    train_walks = walks[num_eval : num_eval + num_train]

    def training_row(walk: Walk) -> TrainingRow:
        negatives = hard_negatives(walk, successors_RP, config.num_negatives, config.seed)
        return TrainingRow(
            query=query_text(walk, places, relations),
            reasoning_query=reasoning_text(walk, places, relations, config),
            prompt=INSTRUCTION,
            positive_passages=(documents[walk.answer][1],),
            negative_passages=tuple(documents[place][1] for place in negatives),
        )

    def eval_query(split: str, number: int, walk: Walk) -> EvalQuery:
        return EvalQuery(
            query_id=f"{split}-{number:05d}",
            text=query_text(walk, places, relations),
            reasoning=reasoning_text(walk, places, relations, config),
            gold=documents[walk.answer][0],
            bridges=tuple(documents[place][0] for place in walk.places[1:-1]),
            hops=len(walk.relations),
            walk=walk,
        )

    labelled = [train_walks, *(ordered_walks(hops) for hops in config.shorter_hops)]
    return World(
        config=config,
        places=places,
        relations=relations,
        successors_RP=successors_RP,
        documents=documents,
        train=tuple(
            training_row(w) for group in labelled for w in group[: config.num_train_queries]
        ),
        dev=tuple(eval_query("dev", i, walk) for i, walk in enumerate(dev_walks)),
        test=tuple(eval_query("test", i, walk) for i, walk in enumerate(test_walks)),
        lm=lm_documents(places, relations, successors_RP, documents, train_walks, config),
    )


# --- the files -------------------------------------------------------------------------------


def world_files(world: World) -> dict[str, str]:
    """Every file of the world by relative path: a BEIR directory, `train.jsonl`, `lm.jsonl`."""
    evaluated = {"dev": world.dev, "test": world.test}
    files = {
        "corpus.jsonl": _jsonl(
            {"_id": doc_id, "title": "", "text": text} for doc_id, text in world.documents
        ),
        "queries.jsonl": _jsonl(
            {
                "_id": query.query_id,
                "text": query.text,
                "instruction": INSTRUCTION,
                "reasoning": query.reasoning,
            }
            for queries in evaluated.values()
            for query in queries
        ),
        "train.jsonl": _jsonl(
            {
                "query": row.query,
                "reasoning_query": row.reasoning_query,
                "prompt": row.prompt,
                "positive_passages": list(row.positive_passages),
                "negative_passages": list(row.negative_passages),
            }
            for row in world.train
        ),
        "lm.jsonl": _jsonl({"text": text} for text in world.lm.facts)
        + _jsonl(
            {"prompt": INSTRUCTION, "query": pair.query, "reasoning": pair.reasoning}
            for pair in world.lm.reasonings
        )
        # of a document the model thinks its subject, in the form in which a walk names its end
        + _jsonl(
            {"document": text, "reasoning": f" {name}.{SEPARATOR * world.config.final_separator}"}
            for name, (_, text) in zip(world.places, world.documents, strict=True)
        ),
    }
    for split, queries in evaluated.items():
        files[f"qrels/{split}.tsv"] = "query-id\tcorpus-id\tscore\n" + "".join(
            f"{query.query_id}\t{query.gold}\t1\n" for query in queries
        )
    return files


def _jsonl(rows: Iterable[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_world(world: World, directory: str | Path) -> None:
    """Writes `world_files` under `directory`, which appears complete or not at all.

    A world written there before is replaced.

    Raises:
        FileExistsError: when `directory` is a file or holds anything that is not part of a world;
            nothing is touched then.
    """
    target = Path(directory).resolve()
    files = world_files(world)
    _refuse_foreign_files(target, set(files))
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.{os.getpid()}.new"
    replaced = target.parent / f".{target.name}.{os.getpid()}.old"
    try:
        for name, content in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode())
        if target.exists():
            # A directory that is not empty cannot be replaced in one call.
            os.replace(target, replaced)
        os.replace(fresh, target)
    except OSError:
        if replaced.exists() and not target.exists():
            os.replace(replaced, target)
        raise
    finally:
        for leftover in (fresh, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def _refuse_foreign_files(target: Path, own: set[str]) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; a directory for the world is wanted")
    found = (path.relative_to(target).as_posix() for path in target.rglob("*"))
    foreign = sorted(name for name in found if name not in own and name != "qrels")
    if foreign:
        raise FileExistsError(
            f"{target} holds {foreign[0]!r}, which is not part of a world, and writing one "
            "replaces the whole directory; name a new directory"
        )
