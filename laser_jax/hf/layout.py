"""The tables that say which tensor of a checkpoint is which leaf of the tree.

Reading, writing and every check follow from `param_slots` and `lora_slots`. Hugging Face keeps a
linear layer as `[out, in]`, the tree as `[in, out]`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from laser_jax.config import BackboneConfig, LoraConfig
from laser_jax.hf.directory import HFError
from laser_jax.settings import listed

Array = Any  # numpy or jax
Tree = dict[str, Any]
TreePath = tuple[str, ...]


class Slot(NamedTuple):
    """One tensor of a checkpoint and its place in the tree."""

    name: str
    path: TreePath
    row: int | None  # on the stacked leading axis; None where the leaf is this tensor alone
    shape: tuple[int, ...]  # in the tree, without the leading axis

    def of(self, leaf: Array) -> Array:
        """This tensor's part of its leaf, in numpy a view."""
        return leaf if self.row is None else leaf[self.row]

    def transposed(self, value: np.ndarray) -> np.ndarray:
        """From the tree's axes to Hugging Face's, or back: of a kernel or an adapter the transpose,
        of any other tensor the same; a view."""
        return value.T if self.order < 0 else value

    @property
    def order(self) -> int:
        """The step through the tree's axes that gives Hugging Face's: -1 where it transposes."""
        return -1 if self.path[-1] in ("kernel", "lora_a", "lora_b") else 1


def _kernel_shapes(backbone: BackboneConfig) -> dict[str, tuple[int, int]]:
    """[in, out] of the seven projections of a layer."""
    d, f = backbone.hidden_size, backbone.intermediate_size
    q = backbone.num_heads * backbone.head_dim
    kv = backbone.num_kv_heads * backbone.head_dim
    return {
        "self_attn.q_proj": (d, q),
        "self_attn.k_proj": (d, kv),
        "self_attn.v_proj": (d, kv),
        "self_attn.o_proj": (q, d),
        "mlp.gate_proj": (d, f),
        "mlp.up_proj": (d, f),
        "mlp.down_proj": (f, d),
    }


def _layer_slots(
    backbone: BackboneConfig, tensors: list[tuple[str, str, str, tuple[int, ...]]]
) -> list[Slot]:
    """The same `(module, tensor name, leaf name, shape)` in every layer."""
    slots = []
    for layer in range(backbone.num_layers):
        is_last = layer == backbone.num_layers - 1
        group, row = ("last_layer", None) if is_last else ("layers", layer)
        for module, tensor, leaf, shape in tensors:
            path = (group, *module.split("."), leaf)
            slots.append(Slot(f"model.layers.{layer}.{module}.{tensor}", path, row, shape))
    return slots


def param_slots(backbone: BackboneConfig) -> list[Slot]:
    """Every tensor of a checkpoint, the LM head last unless it is tied."""
    d, h, v = backbone.hidden_size, backbone.head_dim, backbone.vocab_size
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if backbone.qk_norm:
        norms |= {"self_attn.q_norm": h, "self_attn.k_norm": h}
    kernels = _kernel_shapes(backbone).items()
    layer = [(module, "weight", "kernel", shape) for module, shape in kernels]
    layer += [(module, "weight", "scale", (size,)) for module, size in norms.items()]
    if backbone.qkv_bias:
        with_bias = [(m, shape) for m, shape in kernels if m[-6:] in ("q_proj", "k_proj", "v_proj")]
        layer += [(module, "bias", "bias", shape[1:]) for module, shape in with_bias]
    embedding = Slot("model.embed_tokens.weight", ("embed_tokens", "embedding"), None, (v, d))
    norm = Slot("model.norm.weight", ("norm", "scale"), None, (d,))
    head = Slot("lm_head.weight", ("lm_head", "embedding"), None, (v, d))
    slots = [embedding, *_layer_slots(backbone, layer), norm]
    return slots if backbone.tie_word_embeddings else [*slots, head]


def lora_slots(backbone: BackboneConfig, lora: LoraConfig) -> list[Slot]:
    """Every tensor of an adapter."""
    layer = []
    for module, (fan_in, fan_out) in _kernel_shapes(backbone).items():
        if module.rpartition(".")[2] in lora.targets:
            layer.append((module, "lora_A.weight", "lora_a", (fan_in, lora.rank)))
            layer.append((module, "lora_B.weight", "lora_b", (lora.rank, fan_out)))
    return _layer_slots(backbone, layer)


def leaf_shapes(slots: Iterable[Slot]) -> dict[TreePath, tuple[int, ...]]:
    # Rows come in order, so the last slot of a leaf tells the length of its stack.
    return {s.path: s.shape if s.row is None else (s.row + 1, *s.shape) for s in slots}


def checked_leaves(tree: Tree, slots: list[Slot], root: str) -> dict[TreePath, Array]:
    """The leaves, once they are known to be exactly those that `slots` name."""
    leaves: dict[TreePath, Array] = flatten_dict(tree)
    wanted, got = leaf_shapes(slots), {path: leaf.shape for path, leaf in leaves.items()}
    paths = [path for path in wanted | got if wanted.get(path) != got.get(path)]
    states = [f"{'/'.join(path)} is {got.get(path)}, not {wanted.get(path)}" for path in paths]
    refuse(f"the {root} tree (None: no such leaf)", states)
    return leaves


def refuse(where: str, problems: list[str]) -> None:
    """Raises an error that lists the problems, if there are any."""
    if problems:
        raise HFError(
            f"{where} does not fit its config, {len(problems)} problem(s):\n  "
            f"{listed(problems, 50)}"
        )
