"""Would a rule that stops thinking query by query pay for a model? Asks its finished rankings.

    for S in dev test; do
        laser evaluate model --model M --data D --split $S --eval_thinking_steps '[1, 2, 3, 4]' \
            --output R/$S/D
    done
    python examples/stop_thinking.py M R D [D ...]

Three signs are looked at while a query thinks: how far the pooled vector turned with the last step,
and the entropy and the highest probability of what the state would say next. A rule stops the first
time that a sign falls below, or rises above, a threshold. The dev splits choose the threshold, the
test splits are scored once; sets weigh the same. The fixed K is dev's best.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from laser_jax import load_pretrained
from laser_jax.batch import Tokens
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, right_pad
from laser_jax.encoder import backbone_for
from laser_jax.evaluate.beir import read_beir
from laser_jax.evaluate.results import PER_QUERY_FILE, read_per_query
from laser_jax.losses import pool
from laser_jax.models.directory import model_directory
from laser_jax.thinking import top_tokens
from laser_jax.views import latent_view

METRIC, BATCH, DRAWS = "nDCG@10", 32, 2000
SIGNS = ("turned", "entropy", "top probability")
"""What a rule looks at, after each step but the last."""


def reader(model: str, K: int):
    """A function from queries to their signs [3, Q, K - 1]; how far the first state turned is nan,
    by which no rule stops."""
    directory = str(model_directory(model))
    variables, config = load_pretrained(directory)
    prompts = PromptTokenizer(load_tokenizer(directory), config.prompt)
    backbone, variables = backbone_for(config, variables), jax.device_put(variables)

    @jax.jit
    def look(variables, rows):
        hidden_BKD = latent_view(backbone, variables, rows, K, config.pooling)
        pooled_BKD = jnp.stack([pool(hidden_BKD[:, : k + 1]) for k in range(K)], axis=1)
        turned = 1 - (pooled_BKD[:, 1:] * pooled_BKD[:, :-1]).sum(axis=-1)
        turned = jnp.pad(turned, ((0, 0), (1, 0)), constant_values=jnp.nan)
        said = top_tokens(backbone, variables, hidden_BKD, 1)
        return jnp.stack([turned, said.entropy_BK, said.probabilities_BKn[..., 0]])[:, :, :-1]

    def read(queries):
        rows = [prompts.query(q.text, q.instruction or "") for q in queries]
        signs = np.empty((len(SIGNS), len(rows), K - 1))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for places in (order[i : i + BATCH] for i in range(0, len(rows), BATCH)):
            filled = [rows[i] for i in places] + [rows[places[-1]]] * (BATCH - len(places))
            tokens = Tokens(*right_pad(filled, 0, 16))
            signs[:, places] = np.asarray(look(variables, tokens))[:, : len(places)]
        return signs

    return read


def stops(signs_QS: np.ndarray, threshold: float, below: bool) -> np.ndarray:
    """The place of the K at which each query stops, [Q]: the last where its sign never says so."""
    met = signs_QS < threshold if below else signs_QS > threshold
    return np.append(met, np.ones((len(met), 1), bool), axis=1).argmax(axis=1)


def picked(sets, choose) -> list[np.ndarray]:
    """Each set's values [Q] at the K that `choose` makes of its signs."""
    return [np.take_along_axis(v, choose(s)[:, None], axis=1)[:, 0] for s, v in sets]


def macro(values) -> float:
    return float(np.mean([np.mean(v) for v in values]))


def interval(ours, theirs) -> str:
    """The macro difference, with its 95 % interval over queries, drawn within each set."""
    rng, gaps = np.random.default_rng(0), [a - b for a, b in zip(ours, theirs, strict=True)]
    drawn = [macro(rng.choice(gap, len(gap)) for gap in gaps) for _ in range(DRAWS)]
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(macro(gaps), *np.quantile(drawn, [0.025, 0.975]))


def main(model: str, ranked: Path, data: list[Path]) -> None:
    runs = read_per_query(ranked / "dev" / data[0].name / PER_QUERY_FILE)
    K = sum(re.fullmatch(r"latent K=\d+", name) is not None for name in runs)
    read, found = reader(model, K), {}
    for split in ("dev", "test"):
        found[split] = []
        for folder in data:
            runs = read_per_query(ranked / split / folder.name / PER_QUERY_FILE)
            queries = read_beir(folder, split).queries.values()
            asked = [query for query in queries if query.id in runs["latent K=1"]]
            by_K = [runs[f"latent K={k}"] for k in range(1, K + 1)]
            values_QK = np.array([[run[q.id][METRIC] for run in by_K] for q in asked])
            found[split].append((read(asked), values_QK))
    dev, test = found["dev"], found["test"]
    fixed = [[macro(v[:, k] for _, v in sets) for k in range(K)] for sets in (dev, test)]
    best = int(np.argmax(fixed[0]))
    for k in range(K):
        print(f"K = {k + 1}: dev {fixed[0][k]:.4f}, test {fixed[1][k]:.4f}")
    for name, sets in (("dev", dev), ("test", test)):
        print(f"each query's best K, known: {name} {macro(v.max(axis=1) for _, v in sets):.4f}")
    for sign, name in enumerate(SIGNS):
        seen = np.concatenate([signs[sign].ravel() for signs, _ in dev])
        thresholds = np.quantile(seen[np.isfinite(seen)], np.linspace(0, 1, 41))
        for below in (True, False):
            rules = [lambda s, t=t, b=below, i=sign: stops(s[i], t, b) for t in thresholds]
            chosen = max(rules, key=lambda rule: macro(picked(dev, rule)))
            steps = macro(chosen(signs) + 1 for signs, _ in test)
            gap = interval(picked(test, chosen), [v[:, best] for _, v in test])
            print(
                f"stop when {name} is {'below' if below else 'above'} a threshold: "
                f"dev {macro(picked(dev, chosen)):.4f}, test {macro(picked(test, chosen)):.4f} at "
                f"{steps:.2f} steps; less K = {best + 1} {gap}"
            )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(each) for each in sys.argv[3:]])
