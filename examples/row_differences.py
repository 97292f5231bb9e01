"""How far apart two rows of benchmarks/ablation.py or benchmarks/real.py are, query by query.

    python -m examples.row_differences RESULTS laser@3 contrastive@1 [--seeds 'seed-*'] [--sets ...]

RESULTS is what those programs keep under --work, or a .tar.gz of it such as lie in
benchmarks/results: SEED/ROW/test/ holds a per_query.tsv, or a folder with one for every set. A row
is read at a K or by its view `explicit`. Printed is the first row less the second, with 95 %
intervals: of all seeds together, of each seed, and of each set.
"""

import argparse
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation_table import paired_difference
from benchmarks.measure import BenchmarkError
from benchmarks.real import METRICS, Scores, macro_difference
from laser_jax.evaluate.results import PER_QUERY_FILE, markdown_table, read_per_query
from laser_jax.evaluate.retrieval import EXPLICIT, latent

BySeed = dict[int, Scores]


def named_row(text: str) -> tuple[str, str]:
    """An argparse type: name and run of `laser@3` or `laser@explicit`."""
    name, _, view = text.partition("@")
    if view != EXPLICIT and not view.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: wanted ROW@K, such as laser@3, or ROW@explicit")
    return name, EXPLICIT if view == EXPLICIT else latent(int(view))


def read(folder: Path, name: str, run: str, options: argparse.Namespace) -> BySeed:
    """The row's values by seed. Raises a BenchmarkError where there are none, or two of a seed."""
    found: BySeed = {}
    folders: dict[int, str] = {}
    for file in sorted(folder.glob(f"{options.seeds}/{name}/{options.split}/**/{PER_QUERY_FILE}")):
        place, of = file.relative_to(folder).parts[0], file.parent.name
        number, queries = re.search(r"\d+", place), read_per_query(file).get(run)
        if not number or not queries or of not in (options.sets or [of]):
            continue
        if folders.setdefault(seed := int(number[0]), place) != place:
            both = f"{folders[seed]} and {place}"
            raise BenchmarkError(f"{both} are both of seed {seed}; --seeds is to match one of them")
        if options.metric not in (metrics := next(iter(queries.values()))):
            raise BenchmarkError(f"{file}: no {options.metric}, only {', '.join(metrics)}")
        values = {query: scores[options.metric] for query, scores in queries.items()}
        found.setdefault(seed, {})[of] = {run: values}
    if not found:
        raise BenchmarkError(f"{options.results}: no {run!r} in {options.seeds}/{name}")
    return found


def differences(
    a: BySeed, b: BySeed, runs: tuple[str, str], options: argparse.Namespace
) -> list[tuple[str, str]]:
    """What is compared, and `difference [low, high]`, over the seeds that both rows have and the
    sets that all of these have; what is left out is told. Raises a BenchmarkError where nothing is
    left, or queries differ."""
    seeds = sorted(a.keys() & b.keys())
    there = [list(of[seed]) for of in (a, b) for seed in seeds]
    some = options.sets or list(dict.fromkeys(name for names in there for name in names))
    sets = [name for name in some if all(name in names for names in there)]
    if not seeds or not sets:
        raise BenchmarkError(
            f"{options.results}: the rows share no seed, or no set in all of these"
        )
    for what, left in (("seeds", a.keys() ^ b.keys()), ("sets", set(some) - set(sets))):
        if left:
            print(f"left out are {what} that are not everywhere: {sorted(left)}", file=sys.stderr)
    if sets == [split := options.split]:  # a world for every seed, with queries of its own
        pairs = zip((a, b), runs, strict=True)
        ours, theirs = ({seed: of[seed][split][run] for seed in seeds} for of, run in pairs)
        every: Any = paired_difference(ours, theirs)
        lines = [("all seeds", told(every))]
        if every["over_seeds"]:
            lines.append(("seeds drawn too", told({**every, **every["over_seeds"]})))
        ones = {seed: paired_difference({seed: ours[seed]}, {seed: theirs[seed]}) for seed in seeds}
        return lines + [(f"seed {seed}", told(one)) for seed, one in ones.items()]

    def macro(of_seeds: Iterable[int], names: Sequence[str]) -> str:
        first, second = ([{n: of[s][n] for n in names} for s in of_seeds] for of in (a, b))
        pairs = zip(of_seeds, first, second, strict=True)
        return told(macro_difference({s: (x, runs[0], y, runs[1]) for s, x, y in pairs}))

    lines = [("macro, seeds drawn too", macro(seeds, sets))]
    lines += [(f"macro, seed {seed}", macro([seed], sets)) for seed in seeds]
    return lines + [(name, macro(seeds, [name])) for name in sets]


def told(d: Any) -> str:
    return f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"


def main(arguments: Sequence[str]) -> str:
    """The table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("rows", type=named_row, nargs=2, metavar="ROW@K")
    parser.add_argument("--seeds", default="seed-*", help="their folders; default seed-*")
    parser.add_argument("--sets", nargs="+", help="default: all that are there")
    parser.add_argument("--split", default="test")
    parser.add_argument("--metric", default=METRICS[0])
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as unpacked:
        folder = options.results
        try:
            if folder.is_file():
                with tarfile.open(folder) as archive:
                    archive.extractall(unpacked, filter="data")
                folder = Path(unpacked)
            a, b = (read(folder, name, run, options) for name, run in options.rows)
            runs = (options.rows[0][1], options.rows[1][1])
            lines = differences(a, b, runs, options)
        except (BenchmarkError, OSError, ValueError, tarfile.TarError) as error:
            sys.exit(f"error: {error}")
    less = " less ".join(" at ".join(row) for row in options.rows)
    return markdown_table([less, options.metric], [list(line) for line in lines])


if __name__ == "__main__":
    print(main(sys.argv[1:]))
