"""The pure `encode`: padding, inside other programs, exported; and what does not load."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from laser_jax.config import (
    LoraConfig,
    MeshConfig,
    RetrieverConfig,
    ScratchConfig,
    save_retriever_config,
)
from laser_jax.encoder import (
    backbone_for,
    encode,
    encode_all_steps,
    load_pretrained,
    right_padded,
)
from laser_jax.hf.adapters import merged_adapters
from laser_jax.hf.writing import save_adapter, save_params
from laser_jax.modeling.backbone import Backbone, Variables, unstack_layers
from laser_jax.sharding import MESH_AXES, make_mesh

SCRATCH = ScratchConfig(
    hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24
)
CONFIG = RetrieverConfig(SCRATCH.backbone(30), num_thinking_steps=3)
LORA = LoraConfig(rank=2)
ROWS = [[3, 1, 4], [9], [2, 6, 5], [3, 5, 8, 9, 7, 9, 3, 2], [8]]
EMBED = jax.jit(encode, static_argnames=("config", "num_thinking_steps"))


@pytest.fixture(scope="module")
def variables() -> Variables:
    """Base weights and an adapter that matters."""
    backbone = Backbone(CONFIG.backbone, lora=LORA)
    drawn = nn.meta.unbox(jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), drawn)


@pytest.fixture(scope="module")
def base(variables: Variables) -> Variables:
    return {"params": variables["params"]}


@pytest.fixture(scope="module")
def alone(base: Variables) -> np.ndarray:
    """Each row on its own, with the config's K."""
    return np.concatenate(
        [embed(base, np.array([row]), np.ones((1, len(row)), np.int32)) for row in ROWS]
    )


@pytest.fixture(scope="module")
def separate(base: Variables) -> np.ndarray:
    """[3, rows, D]: all rows at every K, each in a pass of its own."""
    return np.stack([embed(base, *padded(8, left=False), k) for k in (1, 2, 3)])


def embed(
    variables: Variables, ids_BT: np.ndarray, mask_BT: np.ndarray, k: int | None = None
) -> np.ndarray:
    return np.asarray(EMBED(variables, ids_BT, mask_BT, config=CONFIG, num_thinking_steps=k))


def padded(width: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """ROWS in a batch; the padding holds a valid, distracting token."""
    ids_BT, mask_BT = np.full((len(ROWS), width), 7), np.zeros((len(ROWS), width), np.int32)
    for b, row in enumerate(ROWS):
        real = slice(width - len(row), None) if left else slice(0, len(row))
        ids_BT[b, real], mask_BT[b, real] = row, 1
    return ids_BT, mask_BT


# --- the pure function -------------------------------------------------------------------------


def test_real_tokens_move_to_the_front() -> None:
    ids_BT = jnp.array([[0, 0, 5, 6], [5, 6, 0, 0], [0, 5, 6, 0], [1, 2, 3, 4]])
    mask_BT = jnp.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    moved_BT, lengths_B = right_padded(ids_BT, mask_BT)
    assert lengths_B.tolist() == [2, 2, 2, 4]
    rows = [ids[:n].tolist() for ids, n in zip(moved_BT, lengths_B, strict=True)]
    assert rows == [[5, 6], [5, 6], [5, 6], [1, 2, 3, 4]]


def test_a_row_without_real_tokens_counts_as_one_token() -> None:
    _, lengths_B = right_padded(jnp.ones((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.bool_))
    assert lengths_B.tolist() == [1]


@pytest.mark.parametrize("left", [True, False])
def test_padding_and_company_do_not_change_a_vector(base, alone, left) -> None:
    for width in (8, 11):
        np.testing.assert_allclose(embed(base, *padded(width, left=left)), alone, atol=1e-5)


@pytest.mark.parametrize("outside", [-100, 30])
def test_padding_may_hold_ids_without_an_embedding(base, alone, outside: int) -> None:
    for left in (True, False):
        ids_BT, mask_BT = padded(8, left=left)
        ids_BT = np.where(mask_BT, ids_BT, outside)
        np.testing.assert_allclose(embed(base, ids_BT, mask_BT), alone, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8), (5, 6), (5, 9), (8,)])
def test_a_mask_of_another_shape_is_refused(base, shape: tuple[int, ...]) -> None:
    ids_BT, _ = padded(8, left=False)
    with pytest.raises(ValueError, match=r"wanted \[B, T\] ids and mask, got \(5, 8\) and"):
        encode(base, ids_BT, np.ones(shape, np.int32), config=CONFIG)


def test_vectors_are_unit_float32(base, alone) -> None:
    assert alone.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(alone, axis=-1), 1.0, rtol=1e-6)


def test_none_takes_the_configs_steps_and_less_than_one_is_refused(base, separate) -> None:
    batch = padded(8, left=False)
    np.testing.assert_allclose(embed(base, *batch), separate[2], atol=1e-6)
    with pytest.raises(ValueError, match="num_thinking_steps must be at least 1, got 0"):
        embed(base, *batch, 0)


def test_scanned_and_unstacked_layers_give_the_same_vectors(base, alone) -> None:
    unstacked = unstack_layers(base)
    assert not backbone_for(CONFIG, unstacked).scan_layers
    np.testing.assert_allclose(embed(unstacked, *padded(8, left=True)), alone, atol=1e-5)


# --- inside other programs -----------------------------------------------------------------------

BATCH = (np.arange(48, dtype=np.int32).reshape(8, 6) % 29, np.ones((8, 6), np.int32))
BATCH[1][1, :3] = 0  # padding in front of one row and behind another
BATCH[1][2, 4:] = 0


def step(variables: Variables, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    return encode(variables, ids_BT, mask_BT, config=CONFIG)


@pytest.fixture(scope="module")
def wanted(base) -> np.ndarray:
    return embed(base, *BATCH)


def test_it_maps_over_batches(base, wanted) -> None:
    two = jax.jit(jax.vmap(step, in_axes=(None, 0, 0)))(base, *(a.reshape(2, 4, 6) for a in BATCH))
    np.testing.assert_allclose(two.reshape(8, -1), wanted, atol=1e-5)


@pytest.mark.parametrize("names", [("rows",), MESH_AXES])
def test_it_runs_under_shard_map_on_a_mesh_of_any_names(base, wanted, names) -> None:
    sizes = (8,) if names == ("rows",) else (2, 2, 2)
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    rows = PartitionSpec(names[:2])
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows)
    np.testing.assert_allclose(jax.jit(mapped)(base, *BATCH), wanted, atol=1e-5)


@pytest.mark.parametrize("names", [("rows",), MESH_AXES])
def test_it_runs_under_auto_axes_on_an_explicit_mesh(base, wanted, names) -> None:
    sizes = (8,) if names == ("rows",) else (2, 2, 2)
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Explicit,) * len(names))
    rows = PartitionSpec(names[:2])
    with jax.set_mesh(mesh):
        split = jax.device_put(BATCH, NamedSharding(mesh, rows))
        vectors = jax.jit(jax.sharding.auto_axes(step, out_sharding=rows))(base, *split)
    assert vectors.sharding.spec == PartitionSpec(names[:2], None)
    np.testing.assert_allclose(vectors, wanted, atol=1e-5)


def test_it_runs_on_our_mesh(base, wanted) -> None:
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        np.testing.assert_allclose(jax.jit(step)(base, *BATCH), wanted, atol=1e-5)


def test_it_has_a_gradient_that_points_uphill(base) -> None:
    target_D = jnp.eye(16)[3]

    @jax.jit
    def score(variables: Variables) -> jax.Array:
        return (step(variables, *BATCH) @ target_D).sum()

    before, gradient = jax.jit(jax.value_and_grad(score))(base)
    after = score(jax.tree.map(lambda w, g: w + 1e-3 * g, base, gradient))
    length = sum(float((g * g).sum()) for g in jax.tree.leaves(gradient))
    assert float(after - before) == pytest.approx(1e-3 * length, rel=0.2)


def test_all_steps_come_from_one_pass(base, separate) -> None:
    batch = padded(8, left=False)
    every = jax.jit(encode_all_steps, static_argnames=("config", "num_thinking_steps"))
    vectors_BKD = every(base, *batch, config=CONFIG, num_thinking_steps=3)
    np.testing.assert_allclose(vectors_BKD, separate.swapaxes(0, 1), atol=1e-6)
    assert vectors_BKD.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_differentiates_forward_and_backward(base, dtype) -> None:
    """A single row, which in bfloat16 has a product of its own on a CPU. What only has to be
    possible is traced and not compiled."""
    config = dataclasses.replace(CONFIG, dtype=dtype, num_thinking_steps=2)
    base = jax.tree.map(lambda a: jnp.asarray(a, dtype), base)
    norm, ids_BT = base["params"]["norm"]["scale"], jnp.asarray([ROWS[0]])
    direction_D = jnp.asarray(np.random.default_rng(3).normal(size=norm.shape), dtype)

    def vector(scale_D: jax.Array) -> jax.Array:
        params = base["params"] | {"norm": {"scale": scale_D}}
        return encode({"params": params}, ids_BT, jnp.ones_like(ids_BT), config=config)[0]

    def value(scale_D: jax.Array) -> jax.Array:
        return (vector(scale_D) * jnp.linspace(-1, 1, 16)).sum()

    def derivatives(scale_D: jax.Array) -> tuple[jax.Array, ...]:
        """The slope of the value along the direction; its gradient; and the Hessian times it."""
        slope = jax.jvp(value, (scale_D,), (direction_D,))[1]
        return slope, *jax.jvp(jax.grad(value), (scale_D,), (direction_D,))

    if dtype != "float32":
        jax.eval_shape(derivatives, norm)
        jax.eval_shape(lambda a: (jax.jacfwd(vector)(a), jax.linearize(vector, a)[1](a)), norm)
        return
    run, step = jax.jit(derivatives), 1e-3
    slope, gradient_D, curved_D = run(norm)
    np.testing.assert_allclose((gradient_D * direction_D).sum(), slope, rtol=1e-4)
    ahead_D, behind_D = (run(norm + move * direction_D)[1] for move in (step, -step))
    wanted_D = (ahead_D - behind_D) / (2 * step)
    assert np.linalg.norm(curved_D - wanted_D) < 1e-2 * np.linalg.norm(wanted_D)


def test_encoding_scoring_and_ranking_are_one_program(base, wanted) -> None:
    @jax.jit
    def rank(variables, ids_BT, mask_BT, documents_CD):
        scores_BC = step(variables, ids_BT, mask_BT) @ documents_CD.T
        return jax.lax.top_k(scores_BC, 3)

    documents_CD = np.random.default_rng(2).normal(size=(20, 16)).astype(np.float32)
    _, ids = rank(base, *BATCH, documents_CD)
    np.testing.assert_array_equal(ids, np.argsort(-wanted @ documents_CD.T, axis=1)[:, :3])


RELOAD = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("laser_jax", "flax"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import jax, numpy as np
from pathlib import Path
folder = Path(sys.argv[1])
encode = jax.export.deserialize((folder / "encode.bin").read_bytes())
arrays = np.load(folder / "arrays.npz")
params = [arrays[f"p{i}"] for i in range(int(arrays["count"]))]
for ids, mask in ((arrays["ids"], arrays["mask"]), (arrays["ids"][:3, :5], arrays["mask"][:3, :5])):
    np.save(folder / f"{len(ids)}.npy", encode.call(params, ids, mask))
assert not {"laser_jax", "flax"} & set(sys.modules)
"""


def test_an_exported_program_runs_where_laser_jax_is_not(
    base, wanted, tmp_path: Path, one_device
) -> None:
    pytest.importorskip("flatbuffers", reason="jax.export serialises with it: laser-jax[export]")
    leaves, tree = jax.tree.flatten(base)

    def program(leaves: list[jax.Array], ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        return step(jax.tree.unflatten(tree, leaves), ids_BT, mask_BT)

    b, t = jax.export.symbolic_shape("b, t")
    batch = jax.ShapeDtypeStruct((b, t), np.int32)
    weights = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves]
    exported = jax.export.export(jax.jit(program))(weights, batch, batch)
    (tmp_path / "encode.bin").write_bytes(exported.serialize())
    named = {f"p{i}": leaf for i, leaf in enumerate(leaves)}
    np.savez(tmp_path / "arrays.npz", ids=BATCH[0], mask=BATCH[1], count=len(leaves), **named)
    subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path)],
        check=True,
        cwd=tmp_path,
        env=one_device,
    )
    np.testing.assert_allclose(np.load(tmp_path / "8.npy"), wanted, atol=1e-5)
    shorter = embed(base, BATCH[0][:3, :5], BATCH[1][:3, :5])
    np.testing.assert_allclose(np.load(tmp_path / "3.npy"), shorter, atol=1e-5)


# --- loading -----------------------------------------------------------------------------------


def export(directory: Path, variables: Variables, config: RetrieverConfig = CONFIG) -> Path:
    save_params(directory, variables, config.backbone, dtype=np.float32, lora=config.lora)
    save_retriever_config(dataclasses.replace(config, lora=None), directory)
    return directory


def test_an_exported_directory_loads_with_its_config(base, alone, tmp_path: Path) -> None:
    loaded, config = load_pretrained(export(tmp_path, base))
    assert config == CONFIG
    np.testing.assert_array_equal(
        embed(loaded, *padded(8, left=True)), embed(base, *padded(8, left=True))
    )


def test_merged_adapters_and_separate_ones_give_the_same_vectors(variables, tmp_path) -> None:
    batch = padded(8, left=False)
    separate = dataclasses.replace(CONFIG, lora=LORA)
    wanted = EMBED(variables, *batch, config=separate)
    assert np.abs(wanted - embed({"params": variables["params"]}, *batch)).max() > 1e-2
    merged, _ = load_pretrained(export(tmp_path / "merged", variables, separate))
    np.testing.assert_allclose(embed(merged, *batch), wanted, atol=1e-5)

    plain = export(tmp_path / "base", {"params": variables["params"]})
    save_adapter(
        tmp_path / "adapter", variables["lora"], LORA, CONFIG.backbone, base_model=str(plain)
    )
    loaded, _ = load_pretrained(plain, adapter=tmp_path / "adapter")
    np.testing.assert_allclose(embed(loaded, *batch), wanted, atol=1e-5)


def test_an_adapter_is_not_applied_to_a_model_that_it_is_merged_into(variables, tmp_path) -> None:
    separate = dataclasses.replace(CONFIG, lora=LORA)
    merged = export(tmp_path / "merged", variables, separate)
    trained_on = {"params": load_pretrained(merged)[0]["params"]}
    further = tmp_path / "further"
    save_params(
        further,
        trained_on,
        CONFIG.backbone,
        dtype=np.float32,
        lora=None,
        merged=merged_adapters(merged),
    )
    save_retriever_config(CONFIG, further)
    adapter = tmp_path / "adapter"
    # a copy in bfloat16 is the same adapter
    for round_to in ("float32", "bfloat16"):
        lora = jax.tree.map(
            lambda a, dtype=round_to: np.asarray(jnp.asarray(a, dtype), np.float32),
            variables["lora"],
        )
        save_adapter(adapter, lora, LORA, CONFIG.backbone, base_model="base")
        for model in (merged, further):
            with pytest.raises(ValueError, match=rf"adapter: this adapter is merged into {model}"):
                load_pretrained(model, adapter=adapter)
    other = jax.tree.map(lambda a: a + 1, variables["lora"])
    save_adapter(adapter, other, LORA, CONFIG.backbone, base_model="base")
    load_pretrained(merged, adapter=adapter)


def test_a_plain_hugging_face_directory_wants_a_config(base, tmp_path: Path) -> None:
    (export(tmp_path, base) / "laser_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"laser_config\.json is missing.*RetrieverConfig"):
        load_pretrained(tmp_path)
    loaded, config = load_pretrained(tmp_path, config=CONFIG)
    assert config is CONFIG
    assert set(loaded) == {"params"}


def test_a_config_of_another_backbone_is_refused(base, tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG.backbone, rope_theta=7.0)
    with pytest.raises(ValueError, match=r"differs from config\.json"):
        load_pretrained(export(tmp_path, base), config=RetrieverConfig(other))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "laser_config.json"])
def test_a_missing_file_is_named(base, tmp_path: Path, name) -> None:
    (export(tmp_path, base) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_pretrained(tmp_path)


def test_a_spoilt_config_is_named(base, tmp_path: Path) -> None:
    file = export(tmp_path, base) / "laser_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pooling": "mean"}))
    with pytest.raises(ValueError, match=r"laser_config\.json: (.|\n)*mean"):
        load_pretrained(tmp_path)


def test_weights_load_in_the_configs_dtype(base, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    loaded, _ = load_pretrained(export(tmp_path, base, config))
    assert {a.dtype for a in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}


def test_no_rows_give_no_vectors(base) -> None:
    none = np.zeros((0, 4), np.int32)
    assert embed(base, none, none).shape == (0, 16)
