"""The synthetic world: places joined by roads, and questions whose answer has to be walked to.

A relation (the ferry, the salt trail, ...) sends every place to one other place. A query names a
start and the relations to take; its gold document describes the place at the end of the walk and
says nothing about roads, so no word of the query helps to find it: the facts must be known by
heart and composed. Walks of the longest length are split by composition, which makes the dev and
test queries combinations that no training text has spelled out, over facts that all of them hold.

Everything follows from `WorldConfig`, its seed included. Plain text only: tokens come later.
"""

import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laser_jax.data.schema import FIELDS, TrainingRow
from laser_jax.files.durable import folder_written_whole
from laser_jax.settings import require, require_in

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
_NAME_STREAM, _ROAD_STREAM, _DESCRIPTION_STREAM = range(3)
_SPLIT_STREAM, _NEGATIVE_STREAM, _LABEL_STREAM = range(3, 6)


@dataclass(frozen=True)
class WorldConfig:
    """The size of the world and what of it is shown in training."""

    num_places: int = 24
    num_relations: int = 6
    hops: int = 3
    """The length of every walk that is a query."""
    train_share: float = 0.3
    """The share of the walks of length `hops` that training may spell out."""
    num_dev_queries: int = 200
    num_test_queries: int = 500
    num_negatives: int = 6
    """Hard negatives of a training query: start and bridges, then places one wrong hop away. Fewer
    where a small world has no more of them."""
    num_lm_walks: int | None = None
    """How many of training's walks the language model reads the reasoning of, beside all shorter
    ones: the last. None: all."""
    num_train_queries: int | None = None
    """How many of training's walks are labelled for the retriever: the first. None: all."""
    documents_per_place: int = 1
    """Descriptions of each place. All of them answer; a training query is labelled with one."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "world.", "hops", "num_dev_queries", "num_test_queries")
        require_in("[1, inf)", self, "world.", "num_train_queries", "documents_per_place")
        require_in("[0, inf)", self, "world.", "seed", "num_lm_walks")
        require_in("(0, 1)", self, "world.", "train_share")
        require_in(f"[2, {len(RELATION_NAMES)}]", self, "world.", "num_relations")
        # a walk visits no place twice, and no two relations agree
        smallest = max(self.hops + 2, self.num_relations + 1)
        require_in(f"[{smallest}, {len(PLACE_NAMES)}]", self, "world.", "num_places")
        # the start and every bridge of a walk
        require_in(f"[{self.hops}, inf)", self, "world.", "num_negatives")


@dataclass(frozen=True)
class Walk:
    """A composition by index: `relations[i]` leads from `places[i]` to `places[i + 1]`. Its places
    all differ, so the answer is neither the start nor a bridge."""

    places: tuple[int, ...]
    relations: tuple[int, ...]

    @property
    def answer(self) -> int:
        return self.places[-1]


@dataclass(frozen=True)
class Query:
    """A question, its chain of thought and the ids of the documents that answer it."""

    query_id: str
    text: str
    reasoning: str
    gold: tuple[str, ...]
    walk: Walk


@dataclass(frozen=True, eq=False)
class World:
    """Places, roads, and the walks that are shown; all texts follow from them."""

    config: WorldConfig
    places: tuple[str, ...]
    relations: tuple[str, ...]
    successors_RP: NDArray[np.int64]
    """`[R, P]`, read-only: relation r leads from place p to place `successors_RP[r, p]`."""
    documents: tuple[tuple[str, str], ...]
    """(id, text): a description of each place, in the order of `places`; then another of each, and
    so on. The first one's id is the lower-case name."""
    train_walks: tuple[Walk, ...]
    """Those of length `hops` that training may spell out."""
    dev_walks: tuple[Walk, ...]
    test_walks: tuple[Walk, ...]
    lm_walks: tuple[Walk, ...]
    """All walks shorter than `hops`, then those of training that it may read."""

    @functools.cached_property
    def train(self) -> tuple[TrainingRow, ...]:
        """The training rows of the retriever."""
        number, seed = self.config.num_negatives, self.config.seed
        rows = []
        for walk in self.train_walks:
            wrong = hard_negatives(walk, self.successors_RP, number, seed)
            rng = np.random.default_rng([seed, _LABEL_STREAM, walk.places[0], *walk.relations])
            labelled = rng.integers(self.config.documents_per_place)
            negatives = tuple(self.described(place)[labelled][1] for place in wrong)
            positives = (self.described(walk.answer)[labelled][1],)
            question, reasoning = self._question(walk), self._reasoning(walk)
            rows.append(TrainingRow(question, reasoning, INSTRUCTION, positives, negatives))
        return tuple(rows)

    @functools.cached_property
    def dev(self) -> tuple[Query, ...]:
        return self._queries("dev", self.dev_walks)

    @functools.cached_property
    def test(self) -> tuple[Query, ...]:
        return self._queries("test", self.test_walks)

    @functools.cached_property
    def lm(self) -> tuple[Query, ...]:
        """Questions whose chain of thought the backbone reads before it learns to retrieve."""
        return self._queries("lm", self.lm_walks)

    @functools.cached_property
    def facts(self) -> tuple[str, ...]:
        """What the backbone reads beside them: every road in every paraphrase."""
        return tuple(
            template.format(relation=relation, start=start, end=self.places[end])
            for relation, ends in zip(self.relations, self.successors_RP.tolist(), strict=True)
            for start, end in zip(self.places, ends, strict=True)
            for template in _FACTS
        )

    def described(self, place: int) -> tuple[tuple[str, str], ...]:
        """The (id, text) of every description of a place."""
        return self.documents[place :: len(self.places)]

    def _queries(self, split: str, walks: Iterable[Walk]) -> tuple[Query, ...]:
        queries = []
        for number, walk in enumerate(walks):
            text, reasoning = self._question(walk), self._reasoning(walk)
            gold = tuple(id_ for id_, _ in self.described(walk.answer))
            queries.append(Query(f"{split}-{number:05d}", text, reasoning, gold, walk))
        return tuple(queries)

    def _question(self, walk: Walk) -> str:
        """Start and relations by name, neither bridge nor answer."""
        ways = ", then ".join(f"the {self.relations[r]}" for r in walk.relations)
        return f"From {self.places[walk.places[0]]}, take {ways}."

    def _reasoning(self, walk: Walk) -> str:
        """The chain of thought: one segment a hop, the last of which names the answer."""
        return "".join(map(self.named, walk.places[1:]))

    def named(self, place: int) -> str:
        """A segment: the place that is reached. The blank makes a name the same token as within a
        sentence, and every segment ends alike, the last one too."""
        return f" {self.places[place]}.{SEPARATOR}"


def build_roads(num_places: int, num_relations: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Random relations: permutations without fixed points, no two of which agree anywhere. int64
    `[R, P]`: where relation r leads from place p.

    Each is a perfect matching of places to the ends that no earlier relation took from them. That
    bipartite graph is regular, so there is a matching for up to P - 1 relations.
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
    starts, ways = range(num_places), list(itertools.product(range(num_relations), repeat=hops))
    walks = [_walk(table, start, relations) for start in starts for relations in ways]
    return [walk for walk in walks if len(set(walk.places)) == hops + 1]


def _walk(table: list[list[int]], start: int, relations: tuple[int, ...]) -> Walk:
    places = itertools.accumulate(relations, lambda at, way: table[way][at], initial=start)
    return Walk(tuple(places), relations)


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


def _describe(
    places: Sequence[str], number: int, rng: np.random.Generator
) -> tuple[tuple[str, str], ...]:
    parts = {"kind": _KINDS, "craft": _CRAFTS, "sight": _SIGHTS}
    documents = []
    for which, name in itertools.product(range(1, number + 1), places):
        drawn = {part: choices[rng.integers(len(choices))] for part, choices in parts.items()}
        id_ = name.lower() if which == 1 else f"{name.lower()}-{which}"
        documents.append((id_, _DESCRIPTION.format(name=name, **drawn)))
    return tuple(documents)


def hard_negatives(
    walk: Walk, successors_RP: NDArray[np.int64], num_negatives: int, seed: int
) -> tuple[int, ...]:
    """The places that a retriever which walks badly would return: the bridges from the last to the
    first, then the start, then ends of the walks that differ in one relation, in random order. Two
    relations never agree and each is one-to-one, so none of these ends at the answer."""
    table = successors_RP.tolist()
    wrong = [
        _walk(table, walk.places[0], (*walk.relations[:i], r, *walk.relations[i + 1 :])).answer
        for i in range(len(walk.relations))
        for r in range(len(table))
        if r != walk.relations[i]
    ]
    # Seeded by the walk itself: the same walk has the same negatives whatever else is trained.
    rng = np.random.default_rng([seed, _NEGATIVE_STREAM, walk.places[0], *walk.relations])
    shuffled = [wrong[i] for i in rng.permutation(len(wrong)).tolist()]
    return tuple(dict.fromkeys([*walk.places[-2::-1], *shuffled]))[:num_negatives]


def build_world(config: WorldConfig) -> World:
    """The world of `config`; equal configs give equal worlds. Raises a ConfigError where the split
    leaves no training, dev or test walk.

    Dev and test walks come first in the balanced order, so they stay the same while `train_share`
    varies, as long as there are as many of them as are wanted.
    """

    def stream(number: int, *more: int) -> np.random.Generator:
        return np.random.default_rng([config.seed, number, *more])

    names = stream(_NAME_STREAM).permutation(len(PLACE_NAMES))[: config.num_places]
    places = tuple(PLACE_NAMES[i] for i in names.tolist())
    relations = RELATION_NAMES[: config.num_relations]
    successors_RP = build_roads(config.num_places, config.num_relations, stream(_ROAD_STREAM))
    successors_RP.setflags(write=False)

    walks = enumerate_walks(successors_RP, config.hops)
    walks = _balanced_order(walks, stream(_SPLIT_STREAM, config.hops))
    num_train = round(config.train_share * len(walks))
    num_held_out = len(walks) - num_train
    num_dev = min(config.num_dev_queries, num_held_out // 4)
    num_test = min(config.num_test_queries, num_held_out - num_dev)
    require(
        min(num_train, num_dev, num_test) >= 1,
        f"world: {len(walks)} walks of {config.hops} hops with train_share {config.train_share} "
        f"split into {num_train} train, {num_dev} dev and {num_test} test; more places or "
        "relations are wanted",
    )
    num_eval = num_test + num_dev
    composed = tuple(walks[num_eval : num_eval + num_train])
    num_read = num_train if config.num_lm_walks is None else min(config.num_lm_walks, num_train)
    shorter = (enumerate_walks(successors_RP, hops) for hops in range(1, config.hops))
    return World(
        config=config,
        places=places,
        relations=relations,
        successors_RP=successors_RP,
        documents=_describe(places, config.documents_per_place, stream(_DESCRIPTION_STREAM)),
        train_walks=composed[: config.num_train_queries],
        dev_walks=tuple(walks[num_test:num_eval]),
        test_walks=tuple(walks[:num_test]),
        lm_walks=(*itertools.chain(*shorter), *composed[len(composed) - num_read :]),
    )


def world_files(world: World) -> dict[str, str]:
    """Every file of the world by relative path: a BEIR directory, `train.jsonl`, `lm.jsonl`."""
    evaluated = {"dev": world.dev, "test": world.test}
    rows: dict[str, list[dict[str, Any]]] = {
        "corpus.jsonl": [
            {"_id": doc_id, "title": "", "text": text} for doc_id, text in world.documents
        ],
        "queries.jsonl": [
            {"_id": q.query_id, "text": q.text, "instruction": INSTRUCTION}
            | {"reasoning": q.reasoning}
            for queries in evaluated.values()
            for q in queries
        ],
        "train.jsonl": [{name: getattr(row, name) for name in FIELDS} for row in world.train],
        "lm.jsonl": [
            *({"text": text} for text in (*world.facts, *dict(world.documents).values())),
            *({"prompt": INSTRUCTION, "query": q.text, "reasoning": q.reasoning} for q in world.lm),
            # of a document the model thinks its subject, in the form in which a walk names its end
            *(
                {"document": text, "reasoning": world.named(place)}
                for place in range(len(world.places))
                for _, text in world.described(place)
            ),
        ],
    }
    files = {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_file)
        for name, of_file in rows.items()
    }
    for split, queries in evaluated.items():
        judged = (f"{q.query_id}\t{id_}\t1\n" for q in queries for id_ in q.gold)
        files[f"qrels/{split}.tsv"] = "query-id\tcorpus-id\tscore\n" + "".join(judged)
    return files


def write_world(world: World, directory: str | Path) -> None:
    """Writes `world_files` under `directory`, in place of a world that was written there before.
    Raises a FileExistsError where that is a file or holds anything that is not part of a world;
    nothing is touched then."""
    target, files = Path(directory), world_files(world)
    found = {path.relative_to(target).as_posix() for path in target.rglob("*")}
    others = sorted(found - files.keys() - {"qrels"})
    if foreign := [name for name in others if not name.startswith(".")]:  # as of a killed process
        raise FileExistsError(
            f"{target} holds {foreign[0]!r}, which is not part of a world; name a new directory"
        )
    with folder_written_whole(target) as folder:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content.encode())
