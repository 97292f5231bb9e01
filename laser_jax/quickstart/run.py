"""The embedded default: `python -m laser_jax.quickstart`. From nothing to a table, on a CPU.

Generates a world in which retrieval needs reasoning, teaches a tiny backbone to reason in words,
trains it as a retriever in three ways - same backbone, data and steps - and compares them on
compositions that none of them has seen. Every stage is a command that is printed and can be run by
itself; finished stages are not repeated.
"""

import json
import logging
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_jax.command_line import program
from laser_jax.evaluate.retrieval import format_table, latent
from laser_jax.files.claim import Claim
from laser_jax.files.durable import json_text, write_json
from laser_jax.quickstart.world import WorldConfig, build_world, write_world
from laser_jax.settings import Change, as_dict, changes, require, require_in

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COLUMNS = ("nDCG@10", "Hit@1")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuickstartOptions:
    """Generates the embedded world, trains three retrievers on it and prints how well they do."""

    output: str = "runs/world"
    seed: int = 0
    """The seed of the world, the backbone and the training."""


RECORD = "quickstart.json"
METHODS: dict[str, tuple[str, str | None]] = {
    "contrastive": ("plain contrastive (K=1)", "ablation/contrastive.yaml"),
    "gircse": ("GIRCSE", "ablation/gircse.yaml"),
    "laser": ("LaSER", None),
}
"""The table's rows: a title, and which config is laid over configs/quickstart.yaml."""


def _run(module: str, *arguments: str) -> None:
    _log.info("$ python -m %s %s", module, shlex.join(arguments))
    stage = subprocess.Popen([sys.executable, "-m", module, *arguments])
    try:
        if status := stage.wait():
            sys.exit(status)
    except KeyboardInterrupt:
        stage.terminate()  # where the terminal has not told it too
        stage.wait()  # a training saves
        raise


def quickstart(options: QuickstartOptions) -> dict[str, dict[str, float]]:
    """Runs all stages. Returns, and writes to `table.json`, the table: a row a method. Raises a
    ConfigError where the repository's configs/ are not beside the package or the seed is none, and
    an OutputError where the output is another quickstart's or in use; nothing is touched then."""
    fault = f"{CONFIGS} has no quickstart.yaml: run this from a clone of laser_jax"
    require((CONFIGS / "quickstart.yaml").is_file(), fault)
    require_in("[0, 4294967296)", options, "", "seed")

    def changed(old: dict[str, Any]) -> list[Change]:
        return changes(old, options, source=RECORD, changeable=("output",))

    with Claim(options.output, RECORD, changed, alone=True) as claim:
        claim.record(json_text(as_dict(options)))
        return _run_stages(Path(options.output), str(options.seed))


def _run_stages(output: Path, seed: str) -> dict[str, dict[str, float]]:
    began, data = time.monotonic(), output / "data"
    world = build_world(WorldConfig(num_places=20, seed=int(seed)))
    write_world(world, data)
    _log.info(
        f"{data}: {len(world.places)} places, {len(world.relations)} ways between them; "
        f"{len(world.train)} training queries, {len(world.test)} test queries on unseen "
        f"compositions\n  {world.train[0].query}\n"
        f"  -> {' '.join(world.train[0].reasoning_query.split())}"
    )
    _run(
        "laser_jax.pretrain",
        *("--config", str(CONFIGS / "world_pretrain.yaml"), "--texts", str(data / "lm.jsonl")),
        *("--eval", str(data), "--output", str(output / "backbone"), "--seed", seed),
    )
    table: dict[str, dict[str, float]] = {}
    for name, (title, overlay) in METHODS.items():
        laid_over = ("--config", str(CONFIGS / overlay)) if overlay else ()
        _run(
            "laser_jax.train",
            *("--config", str(CONFIGS / "quickstart.yaml"), *laid_over),
            *("--model.path", str(output / "backbone"), "--train.seed", seed),
            *("--data.train", str(data / "train.jsonl"), "--data.eval", str(data)),
            *("--output", str(output / name)),
        )
        scores = json.loads((output / name / "results.json").read_text())["scores"]
        run = json.loads((output / name / "config.json").read_text())
        table[title] = scores[latent(run["objective"]["num_thinking_steps"])]
        if name == "laser":
            table["explicit view (reads the reasoning)"] = scores["explicit"]
    table = {title: {c: row[c] for c in COLUMNS} for title, row in table.items()}
    write_json(output / "table.json", table)
    print(f"\n{len(world.test)} queries on unseen compositions, {len(world.documents)} documents:")
    print(format_table(table))
    print(f"chance: Hit@1 {1 / len(world.documents):.4f}; {time.monotonic() - began:.0f} s in all")
    shown = ["--model", str(output / "laser" / "model"), "--text", world.test[0].text]
    print(f"\nwhat the model thinks:\n$ python -m laser_jax.think {shlex.join(shown)}")
    return table


main = program("quickstart", QuickstartOptions, quickstart)
