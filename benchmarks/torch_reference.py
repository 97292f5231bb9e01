"""LaSER's encoder and training step in PyTorch, written from the method's description alone.

Two transcriptions of the same function, over transformers' own Qwen3 or Llama and PEFT's adapters.
They differ in what an implementer would tune.

`PUBLISHED` is the plain way, with what is known of the released code's cost: eager attention; every
pass goes through the causal LM and its head, so that logits exist at all positions, [B, T, V], of
which the last ones are used; the states of all layers are collected and the last ones are read.
The description leaves open whether the loop keeps a cache or reads the growing input anew. It keeps
one here: the published loop, timed before, took 1.1 times as long for K = 3 as for K = 1, which
reading anew would not allow, and it is the faster of the two. The released code's known defects
(truncation, soft tokens in float16) are not copied: it has to compute our numbers.

`TUNED` computes the same with SDPA, the head on the last position only, states taken from the
decoder itself, no cache where nothing thinks, and a fused AdamW. It has neither our shared prefix
nor the common thinking batch of queries and documents, which are ideas of this project.

Rows are padded on the left, as a cache in transformers wants them. The losses are float32.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import peft
import torch
import transformers
from torch.nn.functional import kl_div, log_softmax, normalize, one_hot, softmax

from benchmarks.measure import torch_device
from benchmarks.targets import COMPILED, PUBLISHED, TUNED
from laser_jax.batch import Batch, Tokens
from laser_jax.config import Dtype, ObjectiveConfig, OptimizerConfig
from laser_jax.hf.writing import save_adapter, save_params
from laser_jax.modeling.backbone import Backbone, Variables

Model = Any
"""A causal LM of transformers."""

# transformers 5.24 gave the cache this name and warns of the older one.
_PARAMETERS = inspect.signature(transformers.Qwen3Model.forward).parameters
CACHE = "cache" if "cache" in _PARAMETERS else "past_key_values"

transformers.utils.logging.disable_progress_bar()

Rows = dict[str, torch.Tensor]
"""Rows padded on the left, on the model's device: its `input_ids`, `attention_mask` and
`position_ids`, each [B, T]."""


def left_padded(tokens: Tokens, device: str) -> Rows:
    """Our right-padded rows, their real tokens moved to the end."""
    T = tokens.ids_BT.shape[1]
    lengths_B1 = torch.asarray(tokens.lengths_B, dtype=torch.long)[:, None]
    positions_BT = torch.arange(T)[None] - (T - lengths_B1)
    ids_BT = torch.asarray(tokens.ids_BT, dtype=torch.long).gather(1, positions_BT % T)
    mask_BT, positions_BT = (positions_BT >= 0).long(), positions_BT.clamp(min=0)
    rows = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT}
    return {name: tensor.to(device) for name, tensor in rows.items()}


def expected_embedding(model: Model, logits_BV: torch.Tensor) -> torch.Tensor:
    """The soft token softmax(logits) E as an input of one position, [B, 1, D]."""
    table_VD = model.get_input_embeddings().weight
    return (softmax(logits_BV.float(), -1).to(table_VD.dtype) @ table_VD)[:, None]


# --- the two ways ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Transcription:
    """One way to compute both views."""

    name: str
    attention: str
    whole: bool
    """Through the causal LM: logits at all positions, the states of all layers, always a cache."""
    fused_optimizer: bool
    compiled: bool = False
    """By `torch.compile`, for each shape anew."""

    def forward(self, model: Model, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The states of all positions, [B, T, D], and the logits of the last where they are a
        by-product."""
        if not self.whole:
            return model.model(**inputs).last_hidden_state, None
        out = model(output_hidden_states=True, **inputs)
        return out.hidden_states[-1], out.logits[:, -1]

    def latent(self, model: Model, rows: Rows, num_thinking_steps: int) -> torch.Tensor:
        """The K hidden states, [B, K, D]."""
        cache: dict[str, Any] = {"use_cache": False}
        if self.whole or num_thinking_steps > 1:
            cache = {CACHE: transformers.DynamicCache(config=model.config), "use_cache": True}
        inputs, mask_BT, logits_BV = rows, rows["attention_mask"], None
        states: list[torch.Tensor] = []
        for step in range(num_thinking_steps):
            if step > 0:
                logits_BV = model.lm_head(states[-1]) if logits_BV is None else logits_BV
                mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
                inputs = {
                    "inputs_embeds": expected_embedding(model, logits_BV),
                    "attention_mask": mask_BT,
                    "position_ids": rows["position_ids"][:, -1:] + step,
                }
            states_BTD, logits_BV = self.forward(model, **inputs, **cache)
            states.append(states_BTD[:, -1])
        return torch.stack(states, dim=1)

    def encoder(self, model: Model, tokens: Tokens, steps: int) -> Callable[[], torch.Tensor]:
        """What embeds one batch, [B, D] unit rows, as often as it is called, and waits for them."""
        rows = left_padded(tokens, str(model.device))

        @torch.inference_mode()
        def run() -> torch.Tensor:
            embeddings_BD = unit_mean(self.latent(model, rows, steps).float())
            _wait(embeddings_BD)
            return embeddings_BD

        return run


_TUNED = Transcription(TUNED, "sdpa", whole=False, fused_optimizer=True)
TRANSCRIPTIONS = {
    PUBLISHED: Transcription(PUBLISHED, "eager", whole=True, fused_optimizer=False),
    TUNED: _TUNED,
    COMPILED: replace(_TUNED, name=COMPILED, compiled=True),
}


# --- models ----------------------------------------------------------------------------------


def load(
    names: Sequence[str], variables: Variables, backbone: Backbone, dtype: Dtype, *, train: bool
) -> dict[Transcription, Model]:
    """Causal LMs with our weights, through files as transformers and PEFT read them, by the
    transcription that computes with each. Adapters are in place and not merged. What wants
    gradients is what is trained: the adapters, or everything where there are none.

    Args:
        backbone: ours, which has these variables.
        dtype: of the files.
    """
    host, models = jax.device_get(variables), {}
    with tempfile.TemporaryDirectory() as directory:
        whole, adapter = Path(directory, "model"), Path(directory, "adapter")
        params, config, lora = {"params": host["params"]}, backbone.config, backbone.lora
        save_params(whole, params, config, dtype=dtype, lora=None)
        if lora is not None:
            save_adapter(adapter, host["lora"], lora, config, base_model=str(whole))
        for transcription in (TRANSCRIPTIONS[name] for name in names):
            model: Model = transformers.AutoModelForCausalLM.from_pretrained(
                whole,
                attn_implementation=transcription.attention,
                dtype="auto",
                trust_remote_code=False,
            )
            if lora is not None:
                wrapped = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=train)
                model = wrapped.get_base_model()
            if transcription.compiled:
                model.model.forward = torch.compile(model.model.forward, dynamic=False)
            models[transcription] = model.to(torch_device()).train(train)
    return models


class TorchTraining:
    """One optimizer step after the other on one batch. Call it for the metrics of a step."""

    def __init__(
        self,
        transcription: Transcription,
        model: Model,
        batch: Batch,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
    ):
        assert batch.explicit is not None
        device = str(model.device)
        self._transcription, self._model, self._objective = transcription, model, objective
        self._query = left_padded(batch.query, device)
        self._documents = left_padded(batch.documents, device)
        self._explicit = left_padded(batch.explicit, device)
        width = self._explicit["input_ids"].shape[1]
        shift_B1 = width - torch.asarray(batch.explicit.lengths_B)[:, None]
        keyframes_BK = torch.asarray(batch.keyframes_BK) + shift_B1
        self._keyframes_BK = keyframes_BK.long().to(device)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._clip_norm = optimizer.clip_norm
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=transcription.fused_optimizer,
        )

    def terms(self) -> dict[str, torch.Tensor]:
        """The loss and its four terms (LaSER equation 14)."""
        transcription, model, objective = self._transcription, self._model, self._objective
        K = objective.num_thinking_steps
        hidden_BKD = transcription.latent(model, self._query, K).float()
        documents_CD = unit_mean(transcription.latent(model, self._documents, K).float())
        states_BTD = transcription.forward(model, use_cache=False, **self._explicit)[0].float()
        index = self._keyframes_BK[:, :, None].expand(-1, -1, states_BTD.shape[-1])
        keyframes_BKD = normalize(states_BTD.gather(1, index), dim=-1)

        scores_BC = unit_mean(hidden_BKD) @ documents_CD.T
        teacher_BC = normalize(states_BTD[:, -1], dim=-1) @ documents_CD.T
        terms = {
            "latent": info_nce(scores_BC, objective.temperature),
            "explicit": info_nce(teacher_BC, objective.temperature),
            "output": ranking_kl(teacher_BC, scores_BC, objective.output_temperature),
            "trajectory": ranking_kl(
                (keyframes_BKD @ documents_CD.T).flatten(0, 1),
                (normalize(hidden_BKD, dim=-1) @ documents_CD.T).flatten(0, 1),
                objective.trajectory_temperature,
            ),
        }
        weights = vars(objective.weights)
        weighted = [weights[name] * term for name, term in terms.items()]
        return {"loss": torch.stack(weighted).sum(), **terms}

    def __call__(self) -> dict[str, float]:
        terms = self.terms()
        terms["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._clip_norm or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad()
        _wait(norm)
        terms["grad_norm"] = norm
        return {name: float(value.detach()) for name, value in terms.items()}


def unit_mean(states_BKD: torch.Tensor) -> torch.Tensor:
    """normalize(mean over the steps), [B, D]."""
    return normalize(states_BKD.mean(dim=1), dim=-1)


def info_nce(scores_BC: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of each query's positive, column b G of C = B G."""
    B, C = scores_BC.shape
    positive_BC = one_hot(torch.arange(B, device=scores_BC.device) * (C // B), C)
    return -(positive_BC * log_softmax(scores_BC / temperature, -1)).sum(-1).mean()


def ranking_kl(
    teacher_BC: torch.Tensor, student_BC: torch.Tensor, temperature: float
) -> torch.Tensor:
    """KL(teacher || student) of the rankings, no gradient into the teacher, mean over rows."""
    return kl_div(
        log_softmax(student_BC / temperature, -1),
        log_softmax(teacher_BC.detach() / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
