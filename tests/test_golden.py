"""The reference implementation's numbers, whatever lies in the folder that LASER_GOLDEN names.

Cases are found by file name; the README beside them describes the arrays and the tolerances. The
collators' files and the index map are read by test_golden_data.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser_jax.alignment import keyframe_positions, token_segment_ends
from laser_jax.batch import Batch, Tokens
from laser_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    KeyframeRule,
    LoraConfig,
    LossWeights,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PromptConfig,
    RetrieverConfig,
)
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, right_pad
from laser_jax.encoder import encode, load_pretrained, right_padded
from laser_jax.hf.adapters import merge_lora
from laser_jax.hf.directory import read_backbone_config
from laser_jax.hf.reading import load_adapter, load_params
from laser_jax.losses import Views, gircse_loss, laser_loss, normalize, pool
from laser_jax.modeling.backbone import Backbone, Variables, unstack_layers
from laser_jax.modeling.packing import Rows
from laser_jax.modeling.rope import rope_at
from laser_jax.step import TrainState, make_train_step
from laser_jax.train.state import learning_rate_schedule, make_optimizer
from laser_jax.views import ExplicitView, explicit_view, latent_view

GOLDEN = Path(os.environ.get("LASER_GOLDEN", Path(__file__).parents[2] / "shared/golden"))

EMBEDDING_ATOL = 1e-5
STATE_TOLERANCE = 1e-4  # of the largest absolute value
LOSS_RTOL = 1e-5
LOSS_ATOL = 5e-6  # a float32 cosine is good to 1e-7, and the temperature multiplies it by 50
GRADIENT_TOLERANCE = 2e-4  # relative L2, tensor by tensor
CURVE_RTOL = 1e-3

TERMS = ("loss", "latent", "explicit", "output", "trajectory")
# The released code's names of the terms, in the order of `loss64` and `comp_grad_norms`.
RELEASED_TERMS = {
    "loss": "loss",
    "loss_q": "latent",
    "loss_kl": "output",
    "loss_teacher": "explicit",
    "loss_latent": "trajectory",
}
COMPONENTS = {"l_q": "latent", "l_kl": "output", "l_t": "explicit", "l_lat": "trajectory"}
Arrays = Any  # an open .npz


# --- discovery ---------------------------------------------------------------------------------


def found(pattern: str, array: str | None = None) -> list[Path | None]:
    """The files of a kind that hold `array`; [None] rather than an empty list, which pytest would
    skip, so that the tests below can tell an absent folder from one without such files."""
    paths = sorted(GOLDEN.glob(pattern))
    return [path for path in paths if array is None or array in np.load(path).files] or [None]


def stem(value: object) -> str:
    return value.stem if isinstance(value, Path) else str(value)


def each(pattern: str, array: str | None = None) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", found(pattern, array), ids=stem)


def each_with_sibling(pattern: str, siblings: str) -> pytest.MarkDecorator:
    """Every case with each of the paths of `siblings`, in which {model} is the case's model."""
    pairs = []
    for case in found(pattern):
        others = sorted(GOLDEN.glob(siblings.format(model=model_of(case)))) if case else []
        pairs += [(case, other) for other in others or [None]]
    ids = [f"{stem(case)}-{stem(other)}" for case, other in pairs]
    return pytest.mark.parametrize(("case", "sibling"), pairs, ids=ids)


def model_of(path: Path) -> str:
    """The model's folder, of which the file name holds the name."""
    names = [folder.name for folder in GOLDEN.iterdir() if (folder / "config.json").is_file()]
    rest = path.stem.partition("_")[2]
    fitting = [name for name in names if rest == name or rest.startswith(f"{name}_")]
    assert fitting, f"{path.name} names none of the models {sorted(names)}"
    return max(fitting, key=len)


@pytest.fixture(autouse=True)
def _discovered(request: pytest.FixtureRequest, golden_dir: Path) -> None:
    parameters = request.node.callspec.params.values()
    assert None not in parameters, f"{golden_dir} holds no file for {request.node.name}"


# --- models, batches, tensors by name ------------------------------------------------------------


@functools.cache
def backbone_of(name: str) -> BackboneConfig:
    return read_backbone_config(GOLDEN / name)


@functools.cache
def variables_of(name: str) -> Variables:
    params = load_params(GOLDEN / name, backbone_of(name), dtype="float32")
    return {"params": jax.tree.map(jnp.asarray, params)}


def unpadded(ids_BT: np.ndarray, mask_BT: np.ndarray) -> list[list[int]]:
    return [ids[mask == 1].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)]


def tensor(tree: Any, name: str, num_layers: int) -> np.ndarray:
    """The array that Hugging Face or PEFT calls `name`, in their orientation."""
    parts = name.removeprefix("base_model.model.").removeprefix("model.").split(".")[:-1]
    layer = None
    if parts[0] == "layers":
        layer, parts = int(parts[1]), parts[2:]
        tree = tree["last_layer" if layer == num_layers - 1 else "layers"]
    for part in parts:
        tree = tree[part.lower()]
    if isinstance(tree, dict):
        [tree] = tree.values()
    array = np.asarray(tree)
    if layer is not None and layer < num_layers - 1:
        array = array[layer]
    # an embedding lies as Hugging Face has it
    return array.T if array.ndim == 2 and parts[0] not in ("embed_tokens", "lm_head") else array


def tensors(case: Arrays, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for key in case.files:
        if key.startswith(prefix):
            yield key.removeprefix(prefix), case[key]


def assert_embeddings(got: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=EMBEDDING_ATOL)


def assert_states(got: Any, wanted: np.ndarray) -> None:
    atol = STATE_TOLERANCE * np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)


def assert_loss(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=LOSS_RTOL, atol=LOSS_ATOL)


def assert_gradient(got: np.ndarray, wanted: np.ndarray, name: str) -> None:
    assert got.shape == wanted.shape, name
    error, norm = np.linalg.norm(got - wanted), np.linalg.norm(wanted)
    assert error <= GRADIENT_TOLERANCE * norm, f"{name}: {error:.2e} off a gradient of {norm:.2e}"


# --- encoding ------------------------------------------------------------------------------------

jitted_encode = jax.jit(encode, static_argnames=("config", "num_thinking_steps"))


@functools.partial(jax.jit, static_argnums=(0, 4))
def thoughts(
    backbone: Backbone, variables: Variables, ids_BT: Any, lengths_B: Any, num_thinking_steps: int
) -> jax.Array:
    return latent_view(
        backbone, variables, Tokens(ids_BT, lengths_B), num_thinking_steps, "prompt_and_thoughts"
    )


def rolled(left_padded: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """Left padding as right padding."""
    shifts = mask_BT.argmax(axis=1)
    return np.stack([np.roll(row, -n) for row, n in zip(left_padded, shifts, strict=True)])


@each_with_sibling("encode_*.npz", "{model}/config*.json")
def test_embeddings(case: Path, sibling: Path) -> None:
    golden, variables = np.load(case), variables_of(model_of(case))
    config = RetrieverConfig(read_backbone_config(sibling))
    left_ids, left_mask = (golden[k].astype(np.int32) for k in ("input_ids", "attention_mask"))
    right_ids, right_mask = rolled(left_ids, left_mask), rolled(left_mask, left_mask)
    for K in golden["Ks"].tolist():
        embed = functools.partial(
            jitted_encode, variables, config=config, num_thinking_steps=int(K)
        )
        assert_embeddings(embed(left_ids, left_mask), golden[f"emb_K{K}"])
        assert_embeddings(embed(right_ids, right_mask), golden[f"emb_K{K}"])


@each("encode_*.npz")
def test_states_in_a_batch_and_rows_alone(case: Path) -> None:
    golden, name = np.load(case), model_of(case)
    ids_BT, lengths_B = right_padded(golden["input_ids"], golden["attention_mask"])
    Ks = golden["Ks"].tolist()

    def states(rows: slice) -> jax.Array:
        args = (variables_of(name), ids_BT[rows], lengths_B[rows], max(Ks))
        return thoughts(Backbone(backbone_of(name)), *args)

    batch_BKD = states(slice(None))
    alone_BKD = jnp.concatenate([states(slice(b, b + 1)) for b in range(len(ids_BT))])
    for K in Ks:  # a state does not depend on how many follow
        assert_states(batch_BKD[:, :K], golden[f"hiddens_K{K}"])
        # of a single row, alone is what it is anyway
        alone = f"emb_alone_K{K}" if f"emb_alone_K{K}" in golden.files else f"emb_K{K}"
        assert_embeddings(pool(alone_BKD[:, :K]), golden[alone])


def layer_states(backbone: Backbone, ids_BT: jax.Array) -> list[jax.Array]:
    """The embeddings and the states after each layer, the last ones after the final norm."""
    x = backbone.embed(ids_BT)
    rope = rope_at(jnp.arange(ids_BT.shape[1])[None, :], backbone.config)
    states = [x]
    for layer in [*backbone.layers, backbone.last_layer]:
        x, _ = layer.read(x, Rows.of(rope, None))
        states.append(x)
    return [*states[:-1], backbone.norm(x)]


@each("encode_*.npz")
def test_trace(case: Path) -> None:
    golden, name = np.load(case), model_of(case)
    traced = {int(k) for key in golden.files for k in re.findall(r"^trace_K(\d+)_", key)}
    mask_BT = golden["attention_mask"] == 1
    ids_BT, lengths_B = right_padded(golden["input_ids"], golden["attention_mask"])
    variables = unstack_layers(variables_of(name))
    backbone = Backbone(backbone_of(name), scan_layers=False)
    by_method = {
        method: jax.jit(functools.partial(backbone.apply, method=method))
        for method in (layer_states, "logits", "soft_token")
    }
    for K in traced:
        states = by_method[layer_states](variables, ids_BT)
        wanted = golden[f"trace_K{K}_layer_hiddens"]
        assert len(states) == len(wanted)
        for got_BTD, wanted_BTD in zip(jax.device_get(states), wanted, strict=True):
            got = [row[:n] for row, n in zip(got_BTD, lengths_B, strict=True)]
            assert_states(np.concatenate(got), wanted_BTD[mask_BT])

        hidden_BKD = thoughts(backbone, variables, ids_BT, lengths_B, K)
        for k, wanted_BV in enumerate(golden[f"trace_K{K}_last_logits"]):
            got_BV = by_method["logits"](variables, hidden_BKD[:, k])
            assert_states(got_BV, wanted_BV)
        for k, wanted_BD in enumerate(golden[f"trace_K{K}_soft_tokens"]):
            got_BD = by_method["soft_token"](variables, hidden_BKD[:, k])
            assert_states(got_BD, wanted_BD)


@each("encode_*.npz")
def test_texts_become_the_recorded_tokens(case: Path) -> None:
    golden = np.load(case)
    config = PromptConfig(
        query_template="{query}",
        chat_template=False,
        allow_special_tokens=True,
        query_max_length=8192,
    )
    prompts = PromptTokenizer(load_tokenizer(GOLDEN / model_of(case)), config)
    rows = [prompts.query(text, "") for text in golden["texts"].tolist()]
    assert rows == unpadded(golden["input_ids"], golden["attention_mask"])
    assert (prompts.pad_id, prompts.eos_id) == (int(golden["pad_id"]), int(golden["eos_id"]))


# --- training ------------------------------------------------------------------------------------


class Segments(NamedTuple):
    """A row's explicit input, EOS included, and the ends of the segments before it."""

    ids: list[int]
    ends: list[int]


def explicit_rows(case: Arrays) -> list[Segments]:
    """The released forward appends EOS to the collator's tokens; no segment holds it."""
    rows = unpadded(case["r_ids"], case["r_mask"])
    query_lengths = case["q_mask"].sum(axis=1)
    padded = case["r_ids"].shape[1]
    # lora_*.npz does not record the starts
    starts = query_lengths + padded - case["r_mask"].sum(axis=1)
    if "cot_start" in case.files:
        np.testing.assert_array_equal(starts, case["cot_start"])
    separator = float(case["newline_id"]) if "newline_id" in case.files else -1.0
    separator_id = int(separator) if separator >= 0 else None
    return [
        Segments(
            [*ids, int(case["eos_id"])],
            token_segment_ends(ids, int(start) - (padded - len(ids)), separator_id),
        )
        for ids, start in zip(rows, starts, strict=True)
    ]


def batch_of(case: Arrays, rule: KeyframeRule) -> Batch:
    def tokens(rows: Sequence[Sequence[int]]) -> Tokens:
        return Tokens(*right_pad(rows, 0, 8))

    rows = explicit_rows(case)
    query = tokens(unpadded(case["q_ids"], case["q_mask"]))
    documents = tokens(unpadded(case["p_ids"], case["p_mask"]))
    keyframes = [keyframe_positions(r.ends, len(r.ids) - 1, int(case["K"]), rule) for r in rows]
    return Batch(
        query=query,
        documents=documents,
        explicit=tokens([row.ids for row in rows]),
        keyframes_BK=np.stack(keyframes),
        contrast_BC=np.ones((len(query.ids_BT), len(documents.ids_BT)), bool),
    )


def query_starts_explicit(batch: Batch) -> bool:
    """Whether one pass can serve both views: not where only the query was truncated, say."""
    assert batch.explicit is not None
    width = min(batch.query.ids_BT.shape[1], batch.explicit.ids_BT.shape[1])
    same = batch.query.ids_BT[:, :width] == batch.explicit.ids_BT[:, :width]
    behind = np.arange(width)[None, :] >= batch.query.lengths_B[:, None]
    fits = batch.query.lengths_B < batch.explicit.lengths_B
    return bool((same | behind).all() and fits.all())


def objective_of(case: Arrays, views: str, rule: KeyframeRule) -> ObjectiveConfig:
    def setting(name: str, default: float) -> float:
        return float(case[name]) if name in case.files else default

    temperature = setting("temperature", 0.02)
    return ObjectiveConfig(
        num_thinking_steps=int(case["K"]),
        weights=LossWeights(
            output=setting("kl_weight", 10.0), trajectory=setting("latent_weight", 0.1)
        ),
        temperature=temperature,
        output_temperature=temperature,
        trajectory_temperature=setting("latent_temperature", 0.05),
        keyframes=rule,
        views=views,  # pyright: ignore[reportArgumentType]
    )


@dataclass(frozen=True)
class Outcome:
    """One training batch: the terms, the gradient of each, and the states behind them."""

    terms: dict[str, np.ndarray]
    gradients: dict[str, Any]
    hidden_BKD: np.ndarray
    documents_CD: np.ndarray
    teacher: ExplicitView

    @property
    def scores_BC(self) -> np.ndarray:
        return pool(self.hidden_BKD) @ self.documents_CD.T

    @property
    def teacher_BC(self) -> np.ndarray:
        return normalize(self.teacher.final_BD) @ self.documents_CD.T


@functools.cache
def compiled(backbone: Backbone, objective: ObjectiveConfig) -> Any:
    """(variables, batch) -> the parts of an Outcome; gradients of the adapters where there are
    some, of the parameters otherwise."""

    @jax.jit
    def run(variables: Variables, batch: Batch) -> Any:
        trainable = "lora" if "lora" in variables else "params"
        query, documents, explicit = batch.query, batch.documents, batch.explicit
        K, pooling = objective.num_thinking_steps, objective.pooling

        def terms(trained: Any) -> tuple[jax.Array, Any]:
            model = (backbone, variables | {trainable: trained})
            hidden_BKD = latent_view(*model, query, K, pooling)
            teacher = explicit_view(*model, explicit, batch.keyframes_BK)
            hidden_CKD = latent_view(*model, documents, K, pooling)
            documents_CD = pool(hidden_CKD)
            B, C = batch.contrast_BC.shape
            values = laser_loss(
                Views(hidden_BKD, hidden_CKD, teacher, None),
                documents_CD,
                documents_CD,
                jnp.arange(B) * (C // B),
                batch.contrast_BC,
                objective,
                jnp.ones(()),
            )
            stacked = jnp.stack([values[name] for name in TERMS])
            return stacked, (stacked, hidden_BKD, documents_CD, teacher)

        # one term after the other: batched, some compilers lose a factor (docs/upstream.md)
        _, backward, rest = jax.vjp(terms, variables[trainable], has_aux=True)
        return jax.lax.map(lambda g: backward(g)[0], jnp.eye(len(TERMS))), rest

    return run


def outcome(
    case: Arrays, name: str, variables: Variables, lora: LoraConfig | None, rule: KeyframeRule
) -> Outcome:
    # The rule only moves keyframes, so one compilation serves both.
    run = compiled(Backbone(backbone_of(name), lora=lora), objective_of(case, "parity", "official"))
    gradients, (values, *states) = run(variables, batch_of(case, rule))
    gradients = jax.tree.map(np.asarray, gradients)
    return Outcome(
        terms={term: np.asarray(values[i]) for i, term in enumerate(TERMS)},
        gradients={
            term: jax.tree.map(lambda a, i=i: a[i], gradients) for i, term in enumerate(TERMS)
        },
        hidden_BKD=states[0],
        documents_CD=states[1],
        teacher=states[2],
    )


@functools.cache
def training(case: Path, rule: KeyframeRule = "official") -> Outcome:
    name = model_of(case)
    return outcome(np.load(case), name, variables_of(name), None, rule)


@each("train_*.npz")
def test_segments_are_as_many_as_recorded(case: Path) -> None:
    golden = np.load(case)
    assert [len(row.ends) for row in explicit_rows(golden)] == golden["n_segments"].tolist()


@each("train_*.npz")
def test_features_become_the_recorded_tokens(case: Path) -> None:
    golden = np.load(case)
    recorded = json.loads(case.with_suffix(".json").read_text())
    collator = recorded["collator"]
    config = PromptConfig(
        query_template="{query}",
        truncation="sequence",
        segmentation="token",
        allow_special_tokens=True,
        chat_template=collator.get("add_chat_template", False),
        append_eos=collator.get("append_eos_token", False),
        query_max_length=collator.get("query_max_len", 512),
        document_max_length=collator.get("passage_max_len", 512),
    )
    prompts = PromptTokenizer(load_tokenizer(GOLDEN / model_of(case)), config)
    features = recorded["features"]
    queries = [prompts.query(feature["query"], "") for feature in features]
    documents = [prompts.document(text) for feature in features for text in feature["passages"]]
    explicit = [prompts.explicit(f["query"], "", f["rewrite"]) for f in features]
    assert queries == unpadded(golden["q_ids"], golden["q_mask"])
    assert documents == unpadded(golden["p_ids"], golden["p_mask"])
    assert [(row.ids, row.segment_ends) for row in explicit] == explicit_rows(golden)


@each("train_*.npz")
def test_losses_and_states(case: Path) -> None:
    golden, ours = np.load(case), training(case)
    for released, term in RELEASED_TERMS.items():
        assert_loss(ours.terms[term], golden[released])
    assert_embeddings(ours.scores_BC, golden["scores"])
    assert_embeddings(ours.teacher_BC, golden["teacher_scores"])
    assert_embeddings(pool(ours.hidden_BKD), golden["q_reps"])
    assert_embeddings(ours.documents_CD, golden["p_reps"])
    assert_embeddings(normalize(ours.teacher.final_BD), golden["teacher_reps"])
    assert_states(ours.hidden_BKD, golden["q_hiddens"])
    assert_states(ours.teacher.keyframes_BKD, golden["teacher_aligned"])


@each("train_*.npz")
def test_gradients(case: Path) -> None:
    golden, gradients = np.load(case), training(case).gradients
    L = backbone_of(model_of(case)).num_layers
    for name, wanted in tensors(golden, "grad/"):
        assert_gradient(tensor(gradients["loss"], name, L), wanted, name)
    for component, term in COMPONENTS.items():
        for name, wanted in tensors(golden, f"compgrad_{component}/"):
            assert_gradient(tensor(gradients[term], name, L), wanted, f"{term} {name}")

    names = golden["grad_names"].tolist()

    def norms(term: str) -> np.ndarray:
        return np.array([np.linalg.norm(tensor(gradients[term], name, L)) for name in names])

    np.testing.assert_allclose(norms("loss"), golden["grad_norms"], rtol=GRADIENT_TOLERANCE)
    for term, wanted in zip(COMPONENTS.values(), golden["comp_grad_norms"], strict=True):
        np.testing.assert_allclose(norms(term), wanted, rtol=GRADIENT_TOLERANCE, err_msg=term)


@each("train_*.npz", "paper1_loss64")
def test_paper_keyframes(case: Path) -> None:
    golden, ours = np.load(case), training(case, "paper")
    for term, wanted in zip(RELEASED_TERMS.values(), golden["paper1_loss64"], strict=True):
        assert_loss(ours.terms[term], wanted)
    assert_states(ours.teacher.keyframes_BKD, golden["paper1_teacher_aligned64"])


@each("train_*.npz")
def test_train_step_follows_the_adamw_curve(case: Path) -> None:
    golden, name = np.load(case), model_of(case)
    # Without a recorded curve: the metrics of a first step.
    wanted = np.array([[float(golden[key]) for key in RELEASED_TERMS]])
    norms = np.array([np.linalg.norm(golden["grad_norms"])])
    if "adamw_curve" in golden.files:
        wanted, norms = golden["adamw_curve"], golden["adamw_grad_global_norm"]

    settings = OptimizerConfig(
        learning_rate=1e-3, warmup_ratio=0.0, schedule="constant", clip_norm=None
    )
    batch = batch_of(golden, "official")
    views = "fast" if query_starts_explicit(batch) else "parity"
    objective = objective_of(golden, views, "official")
    config = Config(
        ModelConfig(path=str(GOLDEN / name)),
        DataConfig(),
        objective=objective,
        optimizer=settings,
    )
    optimizer = make_optimizer(settings, len(norms))
    train_step = jax.jit(
        make_train_step(
            Backbone(backbone_of(name)),
            config,
            optimizer,
            learning_rate_schedule(settings, len(norms)),
        )
    )
    params = variables_of(name)["params"]
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        trained=params,
        frozen=None,
        opt_state=optimizer.init(params),
    )
    trained = params
    for i, row in enumerate(wanted):
        with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
            state, metrics = train_step(state, batch, None)
        got = [float(metrics[term]) for term in RELEASED_TERMS.values()]
        np.testing.assert_allclose(got, row, rtol=CURVE_RTOL, atol=LOSS_ATOL, err_msg=f"step {i}")
        if i < len(norms):
            np.testing.assert_allclose(metrics["grad_norm"], norms[i], rtol=CURVE_RTOL)
            trained = state.trained

    L = backbone_of(name).num_layers
    for key, final in tensors(golden, "adamw_final/"):
        start = tensor(params, key, L)
        error = np.linalg.norm(tensor(trained, key, L) - final) / np.linalg.norm(final - start)
        assert error < CURVE_RTOL, f"{key}: {error:.2e} of its way"


@each("train_*.npz", "gircse_loss")
def test_gircse(case: Path) -> None:
    golden, name = np.load(case), model_of(case)
    K = golden["gircse_q_hiddens"].shape[1]
    backbone, batch = Backbone(backbone_of(name)), batch_of(golden, "official")

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            query_BKD, documents_CKD = (
                latent_view(backbone, {"params": params}, t, K, "thoughts")
                for t in (batch.query, batch.documents)
            )
            B, C = batch.contrast_BC.shape
            positives_B = jnp.arange(B) * (C // B)
            terms = gircse_loss(query_BKD, documents_CKD, positives_B, batch.contrast_BC, 0.02)
            return terms["loss"], (terms, query_BKD, documents_CKD)

        return jax.grad(loss, has_aux=True)(params)

    gradients, (terms, query_BKD, documents_CKD) = run(variables_of(name)["params"])
    assert_loss(terms["loss"], golden["gircse_loss"])
    assert_loss([terms[f"step_{k + 1}"] for k in range(K)], golden["gircse_step_losses"])
    # The difference of logarithms of losses near 10: their relative errors add up.
    np.testing.assert_allclose(terms["penalty"], golden["gircse_penalty"], atol=LOSS_RTOL)
    assert_states(query_BKD, golden["gircse_q_hiddens"])
    assert_states(documents_CKD, golden["gircse_p_hiddens"])
    assert_states(query_BKD.mean(axis=1), golden["gircse_q_emb"])
    assert_states(documents_CKD.mean(axis=1), golden["gircse_p_emb"])
    for key, wanted in tensors(golden, "gircse_grad/"):
        got = tensor(gradients, key, backbone_of(name).num_layers)
        assert_gradient(got, wanted, key)


# --- adapters ------------------------------------------------------------------------------------

each_adapter = each_with_sibling("lora_*.npz", "adapter_{model}*")


@each_adapter
def test_lora_losses_and_gradients(case: Path, sibling: Path) -> None:
    golden, name = np.load(case), model_of(case)
    lora, lora_config = load_adapter(sibling, backbone_of(name))
    variables = variables_of(name) | {"lora": jax.tree.map(jnp.asarray, lora)}
    ours = outcome(golden, name, variables, lora_config, "official")
    for released, term in RELEASED_TERMS.items():
        assert_loss(ours.terms[term], golden[released])
    assert_embeddings(pool(ours.hidden_BKD), golden["q_reps"])
    assert_embeddings(ours.documents_CD, golden["p_reps"])
    gradients = dict(tensors(golden, "grad/"))
    assert len(gradients) == 2 * 7 * backbone_of(name).num_layers
    for key, wanted in gradients.items():
        got = tensor(ours.gradients["loss"], key, backbone_of(name).num_layers)
        assert_gradient(got, wanted, key)


@each("lora_*.npz")
def test_loss_without_the_adapter(case: Path) -> None:
    golden, name = np.load(case), model_of(case)
    ours = outcome(golden, name, variables_of(name), None, "official")
    assert_loss(ours.terms["loss"], golden["base_loss"])


@each_adapter
def test_lora_embeddings(case: Path, sibling: Path) -> None:
    golden, name = np.load(case), model_of(case)
    backbone, K = backbone_of(name), int(golden["K"])
    ids, mask = golden["q_ids"].astype(np.int32), golden["q_mask"]
    lora, lora_config = load_adapter(sibling, backbone)
    base = variables_of(name)
    merged, config = load_pretrained(
        GOLDEN / name, config=RetrieverConfig(backbone), adapter=sibling
    )

    def embed(variables: Variables, config: RetrieverConfig) -> jax.Array:
        return jitted_encode(variables, ids, mask, config=config, num_thinking_steps=K)

    apart = RetrieverConfig(backbone, lora=lora_config)
    assert_embeddings(embed(base, config), golden["emb_base"])
    assert_embeddings(embed(base | {"lora": lora}, apart), golden["emb_unmerged"])
    assert_embeddings(embed(merged, config), golden["emb_merged"])
    hidden_BKD = thoughts(Backbone(backbone), merged, *right_padded(ids, mask), K)
    assert_states(hidden_BKD, golden["hiddens_merged"])

    by_hand = merge_lora(base["params"], lora, lora_config.scale)
    for tree in (merged["params"], by_hand):
        for key, wanted in tensors(golden, "merged/"):
            np.testing.assert_allclose(
                tensor(tree, key, backbone.num_layers), wanted, rtol=1e-6, atol=1e-7
            )
