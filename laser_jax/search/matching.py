"""Ids of queries and documents: how many match nothing, and which documents a query is not given.

Judgements, exclusions and runs name documents and queries by ids alone. Where an id is written in
another way (a blank at its end, another case), nothing matches it, and the score is another one
without any error. So every ranking counts such ids, and refuses a list of which none matches.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from laser_jax.files.reading import DataError


@dataclass(frozen=True)
class IdCount:
    """How many ids something is to be said of, as the footer of a table and its JSON say it."""

    what: str
    count: int
    of: int
    """All different ids that were looked at."""
    first: str

    def __str__(self) -> str:
        return f"{self.what}: {self.count} of {self.of}, the first is {self.first!r}"


def count_ids(what: str, ids: Iterable[str], picked: Iterable[str]) -> tuple[IdCount, ...]:
    """One entry that counts `picked` among the different `ids`; none where nothing is picked."""
    of, found = dict.fromkeys(ids), dict.fromkeys(picked)
    return (IdCount(what, len(found), len(of), next(iter(found))),) if found else ()


def unmatched(
    what: str, ids: Iterable[str], known: Collection[str], where: object, *, refuse_all: bool = True
) -> tuple[IdCount, ...]:
    """Counts those of `ids` that are not among `known`: `what`, such as "judged documents that the
    corpus lacks". Raises a DataError, which names the file `where`, if none is, unless it may be.
    """
    ids = dict.fromkeys(ids)
    counts = count_ids(what, ids, (id_ for id_ in ids if id_ not in known))
    if refuse_all and counts and counts[0].count == len(ids):
        wanted = f"Those looked for are like {min(known)!r}" if known else "There is none to match"
        raise DataError(
            f"{where}: {counts[0]}: not one matches. {wanted}; an id must be written alike "
            "everywhere, blanks and case included. Mend the ids, or leave the list away"
        )
    return counts


def exclusions(
    excluded: Mapping[str, Collection[str]], identical: Iterable[str]
) -> dict[str, Collection[str]]:
    """What no ranking of a query holds: its `excluded` documents, and of the queries `identical`,
    by BEIR's rule, the document of their own id, whatever the judgements say of it. (In ArguAna,
    Quora and alike the query is itself a document and would be its own best answer.)"""
    own = {query: (*excluded.get(query, ()), query) for query in identical}
    return {**excluded, **own}


def identical_count(
    query_ids: Iterable[str], identical: Iterable[str], dropped: bool
) -> tuple[IdCount, ...]:
    """Counts the queries `identical`, whose own id is a document's, and says whether BEIR's rule is
    followed (`dropped`)."""
    rule = "dropped from its ranking (BEIR's rule)"
    what = rule if dropped else "kept (ignore_identical_ids false)"
    return count_ids(f"documents with the id of their query, {what}", query_ids, identical)
