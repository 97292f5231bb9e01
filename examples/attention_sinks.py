"""Do a model's thoughts become attention sinks? `python examples/attention_sinks.py MODEL ROWS...`

A decoder marks the first token of a text as the place where attention goes that has nowhere to go:
an early layer lifts its residual to many times that of other tokens. A soft token that resembles
one is lifted too. Its state then says little of the text, and on the way there gradients explode.
ROWS are training rows; their first queries and positives are read. Printed is, of each thought, the
share whose residual is more than 3 times that of the prompt's last token behind some layer but the
last, and the mean cosine of its state with the prompt's.
"""

from __future__ import annotations

import sys
from itertools import islice

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from laser_jax import load_pretrained
from laser_jax.batch import Tokens
from laser_jax.data.sources import open_source
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, right_pad
from laser_jax.encoder import backbone_for
from laser_jax.losses import normalize
from laser_jax.modeling.backbone import Backbone, apply, empty_suffix, unstack_layers
from laser_jax.models.directory import model_directory

THOUGHTS, ROWS, BATCH, SINK = 2, 40, 20, 3.0


def inspector(model: str):
    """A prompt tokenizer, and a function from rows to [thoughts, B]: how many times the prompt's
    own residual a thought's is, and the cosine of their states."""
    directory = str(model_directory(model))
    variables, config = load_pretrained(directory)
    prompts = PromptTokenizer(load_tokenizer(directory), config.prompt)
    variables = jax.device_put(unstack_layers(variables))
    backbone = backbone_for(config, variables)

    def size(x_B1D):
        return jnp.linalg.norm(x_B1D, axis=-1)[:, 0]

    def run(variables, name: str, *args):
        """A method of the backbone, and what its layers but the last leave behind."""
        wanted = {"mutable": ["intermediates"], "capture_intermediates": lambda _, of: of == name}
        found, seen = nn.apply(getattr(Backbone, name), backbone, **wanted)(variables, *args)
        layers = (
            seen["intermediates"][f"layers_{i}"] for i in range(backbone.config.num_layers - 1)
        )
        return found, [layer[name][0][0] for layer in layers]

    @jax.jit
    def look(variables, rows: Tokens):
        last_B1 = (rows.lengths_B - 1)[:, None]
        (h_B1D, cache), read = run(variables, "read", rows.ids_BT, last_B1)
        own = [jnp.take_along_axis(x, last_B1[..., None], axis=1) for x in read]
        states, suffix, times = [h_B1D[:, 0]], empty_suffix([cache], THOUGHTS), []
        for slot in range(THOUGHTS):
            soft_BD = apply(Backbone.soft_token, backbone, variables, states[-1])
            past = ((cache,), suffix, rows.lengths_B, slot)
            (h_BD, suffix), thought = run(variables, "think", soft_BD, *past)
            pairs = zip(thought, own, strict=True)
            times.append(jnp.stack([size(x) / size(y) for x, y in pairs]).max(axis=0))
            states.append(h_BD)
        unit = [normalize(h_BD) for h_BD in states]
        return jnp.stack(times), jnp.stack([(h * unit[0]).sum(axis=-1) for h in unit[1:]])

    return prompts, lambda rows: jax.device_get(look(variables, rows))


def main(model: str, *files: str) -> None:
    prompts, look = inspector(model)
    rows = [row for file in files for row in islice(open_source(file), ROWS)]
    read = {
        "queries": [prompts.query(row.query, row.prompt) for row in rows],
        "documents": [prompts.document(row.positive_passages[0]) for row in rows],
    }
    for what, ids in read.items():
        width = max(map(len, ids))
        parts = (ids[start : start + BATCH] for start in range(0, len(ids), BATCH))
        found = [look(Tokens(*right_pad(part, prompts.pad_id, width))) for part in parts]
        times, cosines = (np.concatenate(values, axis=1) for values in zip(*found, strict=True))
        for k in range(THOUGHTS):
            print(
                f"{what}, thought {k + 1}: {np.mean(times[k] > SINK):.1%} of {len(ids)} are sinks "
                f"(residual up to {times[k].max():.0f} times), cosine {cosines[k].mean():.2f}"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
