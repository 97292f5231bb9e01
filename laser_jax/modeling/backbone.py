"""One decoder that is Qwen3, Qwen2.5, Llama 3.x or Mistral, by configuration.

Rows are right-padded and positions count from 0, so no mask tensor exists (see `attention`).
The last layer is a module of its own: its queries, output projection and MLP run only at the
positions whose state is used. The layers before it are scanned over stacked parameters, or, after
`unstack_layers`, run one by one from separate leaves; both read the same weights.

Dimension letters: B batch, T tokens, P selected positions, S thinking slots, D model, N heads,
G key-value heads, H head dim, F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from laser_jax.config import AttentionKernel, BackboneConfig, LoraConfig, Remat
from laser_jax.modeling.attention import (
    KeyValues,
    Past,
    accumulation_dtype,
    causal_attention,
    counted_attention,
    exact_matmuls,
    thinking_attention,
)
from laser_jax.modeling.kernels import laid_out, matmul, paired
from laser_jax.modeling.lora import Projection
from laser_jax.modeling.packing import Packing, Rows
from laser_jax.modeling.rope import Rope, apply_rope, rope_at, rope_from_zero
from laser_jax.sharding import constrain, with_axes

Variables = Any
"""{"params": ...} and, with adapters, "lora": nested dicts of arrays."""

Cache = tuple[Any, KeyValues]
"""Keys and values of (all layers but the last, the last layer). The first part is stacked
[L-1, B, T, G, H] for scanned layers and a tuple of [B, T, G, H] for unstacked ones."""

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class RMSNorm(nn.Module):
    """x / rms(x) * scale; the mean of squares is at least float32, for bf16 loses it."""

    eps: float
    axis: str
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale", with_axes(nn.initializers.ones, (self.axis,)), (x.shape[-1],), self.param_dtype
        )
        return _rms_normed(x, scale, self.eps)


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _rms_normed(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Kept for the backward pass is x alone, not the float32 values between."""
    wide = x.astype(accumulation_dtype(x.dtype))
    # x comes second: jaxlib 0.10.2 on a CPU loses a broadcast first factor that is read again, as
    # x is where this backward pass is batched over cotangents (docs/upstream.md)
    normed = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * wide
    return normed.astype(x.dtype) * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


@functools.partial(jax.checkpoint, prevent_cse=False)
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Kept for the backward pass are both inputs. The gate is rounded once, as PyTorch does."""
    wide = gate.astype(accumulation_dtype(gate.dtype))
    return jax.nn.silu(wide).astype(gate.dtype) * up


class Embedding(nn.Module):
    """A [V, D] table: the input embedding, or the LM head of an untied checkpoint.

    Random weights have variance 1 / fan-in, here and in `Projection`: at 0.02 a backbone of width
    100 starts so close to linear that it does not learn to look a fact up.
    """

    vocab_size: int
    hidden_size: int
    param_dtype: DTypeLike

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding",
            with_axes(nn.initializers.normal(self.hidden_size**-0.5), ("vocab", "embed")),
            (self.vocab_size, self.hidden_size),
            self.param_dtype,
        )

    def __call__(self) -> jax.Array:
        return self.embedding


class Attention(nn.Module):
    config: BackboneConfig
    project: Callable[..., Projection]
    param_dtype: DTypeLike
    kernel: AttentionKernel

    def setup(self) -> None:
        c = self.config
        qkv = functools.partial(self.project, use_bias=c.qkv_bias)
        self.q_proj = qkv(c.num_heads * c.head_dim, ("embed", "heads"))
        self.k_proj = qkv(c.num_kv_heads * c.head_dim, ("embed", "kv_heads"))
        self.v_proj = qkv(c.num_kv_heads * c.head_dim, ("embed", "kv_heads"))
        self.o_proj = self.project(c.hidden_size, ("heads", "embed"))
        if c.qk_norm:
            self.q_norm = RMSNorm(c.rms_norm_eps, "head_dim", self.param_dtype)
            self.k_norm = RMSNorm(c.rms_norm_eps, "head_dim", self.param_dtype)

    def _heads(self, x: jax.Array, axis: str) -> jax.Array:
        heads, H = x.shape[2] // self.config.head_dim, self.config.head_dim
        return constrain(laid_out(x.reshape(*x.shape[:2], heads, H)), "batch", None, axis, None)

    def _queries(self, x: jax.Array, rope: Rope) -> jax.Array:
        q = self._heads(self.q_proj(x), "heads")
        return apply_rope(self.q_norm(q) if self.config.qk_norm else q, rope)

    def _keys_values(self, x: jax.Array, rope: Rope) -> KeyValues:
        k = self._heads(self.k_proj(x), "kv_heads")
        k = apply_rope(self.k_norm(k) if self.config.qk_norm else k, rope)
        return KeyValues(k, self._heads(self.v_proj(x), "kv_heads"))

    def _output(self, out_BTNH: jax.Array) -> jax.Array:
        return self.o_proj(jax.lax.collapse(out_BTNH, 2))

    def read(
        self, x: jax.Array, rows: Rows, select_BP: jax.Array | None
    ) -> tuple[jax.Array, KeyValues]:
        kv = jax.tree.map(rows.pad, self._keys_values(x, rows.rope))
        if select_BP is None:
            q_BTNH = rows.pad(self._queries(x, rows.rope))
            return self._output(rows.pack(causal_attention(q_BTNH, kv, self.kernel))), kv
        q_BPNH = self._queries(rows.take(x, select_BP), rows.rope_T.at(select_BP))
        return self._output(counted_attention(q_BPNH, kv, select_BP + 1)), kv

    def think(
        self, x_B1D: jax.Array, rope: Rope, past: Past, lengths_B: jax.Array, slot: jax.Array
    ) -> tuple[jax.Array, KeyValues]:
        suffix = past.suffix.write(self._keys_values(x_B1D, rope), slot)
        past = Past(past.prefixes, suffix)
        return self._output(
            thinking_attention(self._queries(x_B1D, rope), past, lengths_B, slot, self.kernel)
        ), suffix


class MLP(nn.Module):
    config: BackboneConfig
    project: Callable[..., Projection]

    def setup(self) -> None:
        c = self.config
        self.gate_proj = self.project(c.intermediate_size, ("embed", "ffn"))
        self.up_proj = self.project(c.intermediate_size, ("embed", "ffn"))
        self.down_proj = self.project(c.hidden_size, ("ffn", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(_swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """A pre-norm decoder layer. Returns its output and the keys and values it leaves behind.
    `project` makes a projection of so many features along such axes."""

    config: BackboneConfig
    project: Callable[..., Projection]
    param_dtype: DTypeLike
    kernel: AttentionKernel

    def setup(self) -> None:
        self.input_layernorm = RMSNorm(self.config.rms_norm_eps, "embed", self.param_dtype)
        self.self_attn = Attention(self.config, self.project, self.param_dtype, self.kernel)
        self.post_attention_layernorm = RMSNorm(self.config.rms_norm_eps, "embed", self.param_dtype)
        self.mlp = MLP(self.config, self.project)

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        x = constrain(x, "batch", None, None)  # else fsdp splits activations over D, not weights
        return constrain(x + self.mlp(self.post_attention_layernorm(x)), "batch", None, None)

    def read(
        self, x: jax.Array, rows: Rows, select_BP: jax.Array | None = None
    ) -> tuple[jax.Array, KeyValues]:
        """A whole sequence, causally; the output [B, P, D] only at the positions that are selected,
        or at all of them, as they lie. Keys and values are padded rows [B, T, G, H]."""
        out, kv = self.self_attn.read(self.input_layernorm(x), rows, select_BP)
        residual = x if select_BP is None else rows.take(x, select_BP)
        return self._feed_forward(residual + out), kv

    def think(
        self, x_B1D: jax.Array, past: Past, rope: Rope, lengths_B: jax.Array, slot: jax.Array
    ) -> tuple[jax.Array, KeyValues]:
        """One more position behind the prompt and the earlier thoughts; returns the suffix."""
        out, suffix = self.self_attn.think(self.input_layernorm(x_B1D), rope, past, lengths_B, slot)
        return self._feed_forward(x_B1D + out), suffix


class Backbone(nn.Module):
    """The decoder. `scan_layers` says which parameter layout it reads (see `unstack_layers`);
    `remat` what the backward pass through stacked layers recomputes; `reverse_only` that its
    products need no forward mode (see `kernels.matmul`)."""

    config: BackboneConfig
    lora: LoraConfig | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    scan_layers: bool = True
    attention: AttentionKernel = "xla"
    remat: Remat = "none"
    reverse_only: bool = False

    def setup(self) -> None:
        c = self.config
        product = functools.partial(matmul, reverse_only=self.reverse_only)
        project = functools.partial(
            Projection,
            lora=self.lora,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            product=product,
        )
        args = (c, project, self.param_dtype, self.attention)
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, self.param_dtype)
        if not c.tie_word_embeddings:
            self.lm_head = Embedding(c.vocab_size, c.hidden_size, self.param_dtype)
        # stacked, it is one module whose variables are stacked, see _scan
        stacked = self.scan_layers and c.num_layers > 1
        self.layers = Layer(*args) if stacked else [Layer(*args) for _ in range(c.num_layers - 1)]
        self.last_layer = Layer(*args)
        self.norm = RMSNorm(c.rms_norm_eps, "embed", self.param_dtype)

    def embed(self, ids_BT: jax.Array) -> jax.Array:
        """Input embeddings [B, T, D] in the compute dtype."""
        x_BTD = jnp.take(self.embed_tokens(), ids_BT, axis=0).astype(self.dtype)
        return constrain(x_BTD, "batch", None, None)

    def read(
        self, ids_BT: jax.Array, select_BP: jax.Array | None, packing: Packing | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads right-padded prompts.

        Args:
            ids_BT: int token ids; padding behind each row may hold any valid id.
            select_BP: int positions whose states are wanted; None for all of them.
            packing: reads them without their padding, where positions are selected.

        Returns:
            States after the final norm, [B, P, D] (or [B, T, D]) in the compute dtype, and the
            cache of keys and values over all T positions.
        """
        rows = Rows.of(rope_from_zero(ids_BT.shape[1], self.config), packing)
        x = self.embed(rows.pack(ids_BT))
        x, earlier = self._through(lambda layer, x, _: layer.read(x, rows), x)
        x, last = self.last_layer.read(x, rows, select_BP)
        return self.norm(x), (earlier, last)

    def _through(
        self, body: Callable[..., Any], x: jax.Array, past: Any = None
    ) -> tuple[jax.Array, Any]:
        """Runs `body(layer, x, its part of past)` through all layers but the last. Returns x and
        what is left behind, which is stacked, or a tuple, as the layers and the parts of `past`."""
        if not isinstance(self.layers, Layer):
            left = []
            for i, layer in enumerate(self.layers):
                own = past and Past(tuple(of[i] for of in past.prefixes), past.suffix[i])
                x, kv = body(layer, x, own)
                left.append(kv)
            return x, tuple(left)
        if self.remat != "none":
            body = nn.remat(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return nn.scan(
            body,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            length=self.config.num_layers - 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.layers, x, past)

    def think(
        self,
        x_BD: jax.Array,
        prefixes: tuple[Cache, ...],
        suffix: Cache,
        lengths_B: jax.Array,
        slot: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """One thinking step: reads the input embedding `x` at position lengths + slot.

        Args:
            x_BD: the soft token, compute dtype; rows of all groups, merged.
            prefixes: caches of the prompts, read only, one for each group of rows.
            suffix: cache of S thinking slots, of which the first `slot` are written.
            lengths_B: how many positions of a row's prefix are real.

        Returns:
            The state after the final norm [B, D] and the suffix with slot `slot` written.
        """
        x = x_BD[:, None, :]
        rope = rope_at((lengths_B + slot)[:, None], self.config)
        earlier_prefixes, last_prefixes = zip(*prefixes, strict=True)
        x, earlier = self._through(
            lambda layer, x, past: layer.think(x, past, rope, lengths_B, slot),
            x,
            Past(earlier_prefixes, suffix[0]),
        )
        x, last = self.last_layer.think(x, Past(last_prefixes, suffix[1]), rope, lengths_B, slot)
        return self.norm(x)[:, 0], (earlier, last)

    def logits(self, h: jax.Array) -> jax.Array:
        """Next-token logits [..., V] in float32 for states [..., D]."""
        head = self.embed_tokens() if self.config.tie_word_embeddings else self.lm_head()
        accumulate = accumulation_dtype(self.dtype)
        logits = jnp.einsum(
            "...d,vd->...v", paired(h), head.astype(self.dtype), preferred_element_type=accumulate
        )[: h.shape[0]]
        return constrain(logits, "batch", *[None] * (h.ndim - 2), "vocab")

    def soft_token(self, h_BD: jax.Array) -> jax.Array:
        """The expected embedding of the next token, softmax(W h) E (LaSER equation 4).

        Logits and softmax are float32: bf16 logits move the soft token by several per cent.
        """
        p_BV = paired(jax.nn.softmax(self.logits(h_BD), axis=-1).astype(self.dtype))
        table_VD = self.embed_tokens().astype(self.dtype)
        accumulate = accumulation_dtype(self.dtype)
        t_BD = jnp.einsum("bv,vd->bd", p_BV, table_VD, preferred_element_type=accumulate)
        return constrain(t_BD[: h_BD.shape[0]].astype(self.dtype), "batch", None)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Logits at every position, [B, T, V] float32: for causal-LM training and for init."""
        h_BTD, _ = self.read(ids_BT, None)
        return self.logits(h_BTD)


def empty_suffix(prefixes: Sequence[Cache], slots: int) -> Cache:
    """A zeroed cache for `slots` thinking steps of all rows, shaped after the prompts'."""
    rows = sum(last.k.shape[0] for _, last in prefixes)

    def zeros(a: jax.Array) -> jax.Array:
        # zeros_like: under a caller's shard_map they vary over the mesh axes as the prompts do
        return jnp.zeros_like(a, shape=(*a.shape[:-4], rows, slots, *a.shape[-2:]))

    return jax.tree.map(zeros, prefixes[0])


def apply(method: Callable[..., Any], backbone: Backbone, variables: Variables, *args: Any) -> Any:
    """`method` of the backbone on `variables`, its float32 matmuls in full precision."""
    with exact_matmuls(backbone.dtype):
        return nn.apply(method, backbone)(variables, *args)


def unstack_layers(variables: Variables) -> Variables:
    """The scanned layout with `layers` split into `layers_0`, `layers_1`, ...: faster on CPU and
    GPU inference. Checkpoints and Hugging Face files only know the scanned layout."""

    def split(tree: Any) -> Any:
        stacked = tree.get("layers")
        if stacked is None:
            return tree
        rest = {name: value for name, value in tree.items() if name != "layers"}
        count = jax.tree.leaves(stacked)[0].shape[0]
        layers = {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(count)}
        return rest | layers

    return {name: split(tree) for name, tree in variables.items()}


def is_stacked(variables: Variables) -> bool:
    """Whether `variables` are in the scanned layout."""
    return "layers_0" not in variables["params"]
