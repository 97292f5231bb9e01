"""A retriever that laser_jax trained, as a module of sentence-transformers, in plain PyTorch.

It reads the prompts of training, thinks K latent steps and pools their states. A copy goes into
every export, with `prompts` and `control_tokens`; laser_jax never imports it, as it wants torch.

Dimension letters: B batch, T tokens of the longest prompt, K thinking steps, D model, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Qwen3Model,
)
from transformers.utils.hub import cached_file

from laser_jax.data.control_tokens import TextTokenizer  # transformers 4 copies what stands here
from laser_jax.data.prompts import Prompts

# Releases of transformers differ in the name.
_CACHE = "cache" if "cache" in signature(Qwen3Model.forward).parameters else "past_key_values"
CONFIG_FILES = ("config.json", "laser_config.json")


class LaserRetriever(torch.nn.Module):
    """Texts to unit vectors.

    A prompt of sentence-transformers is here the instruction of a query, in words. Texts without
    prompt and role are documents.

    `num_thinking_steps` is K, `encode(..., num_thinking_steps=K)` takes another for a call;
    `document_thinking_steps` is that of documents, None the same. `files` holds both configs.
    """

    forward_kwargs = frozenset({"num_thinking_steps"})
    save_in_root = True

    def __init__(self, model: Any, tokenizer: TextTokenizer, *files: dict[str, Any]) -> None:
        """Raises a ValueError where the tokenizer makes other prompts than in training."""
        super().__init__()
        self.model, self.files = model, files
        self.tokenizer: Any = tokenizer
        config = files[1]
        self.num_thinking_steps: int = config["num_thinking_steps"]
        self.document_thinking_steps: int | None = config.get("document_thinking_steps")
        self._prompts = Prompts(tokenizer, SimpleNamespace(**config["prompt"]))  # pyright: ignore
        made = self._prompts.checksum()
        if config["prompt_checksum"] not in (None, made):
            raise ValueError(
                "tokenizer and chat template do not make the prompts of training: their checksum "
                f"is {made}, and laser_config.json has {config['prompt_checksum']}. Bring the "
                "exported files back, or take another release of transformers and tokenizers"
            )

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        trust_remote_code: bool = False,
        cache_folder: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> LaserRetriever:
        """Loads an export from a directory or the hub, in float32 unless `model_kwargs` (for
        transformers) have another dtype; sentence-transformers calls it.

        Raises:
            ValueError: the code is not trusted, a keyword cannot be taken, or the weights do not
                fit.
        """
        if not trust_remote_code:
            why = "thinks with code of its own, and pooling is no replacement"
            raise ValueError(f"{model_name_or_path} {why}: pass trust_remote_code=True")
        where = {key: others.pop(key, None) for key in ("token", "revision", "local_files_only")}
        where |= {"cache_dir": cache_folder, "local_files_only": bool(where["local_files_only"])}
        allowed = ("", None, "torch", model_name_or_path)
        if unknown := {k: v for k, v in others.items() if v and v not in allowed}:
            raise ValueError(f"of loading only model_kwargs can be set, got {unknown}")
        files = [str(cached_file(model_name_or_path, name, **where)) for name in CONFIG_FILES]
        config, laser_config = (json.loads(Path(f).read_text(encoding="utf-8")) for f in files)
        backbone, options = config["backbone"], dict(model_kwargs or {})
        dtype = options.pop("torch_dtype", None) or options.pop("dtype", None) or torch.float32
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_name_or_path,
            config=CONFIG_MAPPING[config["backbone_type"]].from_dict(backbone),
            dtype=dtype,
            output_loading_info=True,
            **where,
            **options,
        )
        model, info = loaded
        if wrong := {name: keys for name, keys in info.items() if keys}:
            raise ValueError(f"{model_name_or_path}: the weights do not fit config.json: {wrong}")
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, config=model.config, **where)
        return cls(model, tokenizer, config, laser_config)

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Writes what `load` reads; sentence-transformers adds this code."""
        folder = Path(output_path)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        backbone = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        backbone.pop("model_type")
        K, prompt = self.num_thinking_steps, vars(self._prompts.config)
        changed = {"backbone": backbone}, {"num_thinking_steps": K, "prompt": prompt}
        for name, old, new in zip(CONFIG_FILES, self.files, changed, strict=True):
            (folder / name).write_text(json.dumps(old | new, indent=2) + "\n", encoding="utf-8")

    @property
    def max_seq_length(self) -> int:
        """Tokens of a query or a document, prompt included; setting it sets both limits."""
        limits: Any = self._prompts.config
        return max(limits.query_max_length, limits.document_max_length)

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        vars(self._prompts.config).update(query_max_length=tokens, document_max_length=tokens)

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.model.config.hidden_size

    def preprocess(
        self,
        inputs: Sequence[str],
        prompt: str | None = None,
        task: str | None = None,
        **others: Any,
    ) -> dict[str, torch.Tensor]:
        """The prompts of texts as left-padded rows: `input_ids` and `attention_mask`, int64 [B, T],
        and `thinking_steps`, int64 [B], K of each by its role.

        Args:
            prompt: of a query the instruction, "" for none; or the model's own template of a role,
                as `prompts` of sentence-transformers has it, which says the role.
            task: the role, `query` or `document`.

        Raises:
            ValueError: an input is no text; the instruction is missing, goes with a document, or
                leaves no room for the text; or a keyword is unknown.
        """
        if unknown := [key for key in others if key != "num_thinking_steps" and others[key]]:
            raise ValueError(f"{', '.join(unknown)}: this model has no such setting")
        if wrong := [text for text in inputs if not isinstance(text, str)]:
            raise ValueError(f"texts are wanted, got {wrong[0]!r:.80}")
        config = self._prompts.config
        templates = {config.query_template: "query", config.document_template: "document"}
        named = templates.get(prompt or "")
        role = named or task or ("query" if prompt else "document")
        if role not in ("query", "document") or role != (task or role):
            raise ValueError(f"the prompt {prompt!r} does not go with the task {task!r}")
        instruction = None if named else prompt
        if role == "document" and instruction:
            raise ValueError(f"a document has no instruction, got {instruction!r}")
        if role == "query" and instruction is None and "{instruction}" in config.query_template:
            raise ValueError(
                'a query wants an instruction: pass prompt=..., the task in words, or "" for none; '
                'or set prompts["query"] of the model to it'
            )
        if role == "query":
            rows = [self._prompts.query(text, instruction or "") for text in inputs]
            K = self.num_thinking_steps
        else:
            rows = [self._prompts.document(text) for text in inputs]
            K = self.document_thinking_steps or self.num_thinking_steps
        width = max(map(len, rows))
        pads = [width - len(row) for row in rows]
        ids_BT = [[0] * pad + row for pad, row in zip(pads, rows, strict=True)]
        mask_BT = [[0] * pad + [1] * (width - pad) for pad in pads]
        return {
            "input_ids": torch.tensor(ids_BT),
            "attention_mask": torch.tensor(mask_BT),
            "thinking_steps": torch.full((len(rows),), K),
        }

    def forward(
        self, features: dict[str, torch.Tensor], num_thinking_steps: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Adds `sentence_embedding`, [B, D] float32 unit rows (LaSER equations 3 to 6), to what
        `preprocess` made, at its K unless another is given. Logits, softmax and expected embedding
        are computed in float32.

        Raises:
            ValueError: K is below 1, the model has fewer positions, or a vector is not finite.
        """
        own = int(features["thinking_steps"].max())
        K = own if num_thinking_steps is None else num_thinking_steps
        skipped = int(self.files[1]["pooling"] == "thoughts")  # GIRCSE's leave out the prompt's
        mask_BT, room = features["attention_mask"], self.model.config.max_position_embeddings
        lengths_B1, thoughts = mask_BT.sum(1, keepdim=True), K - 1 + skipped
        if K < 1 or int(lengths_B1.max()) + thoughts > room:
            raise ValueError(f"{K} thinking steps; 1 at least, within {room} positions, are wanted")
        table_VD = self.model.get_input_embeddings().weight
        past = {_CACHE: DynamicCache(config=self.model.config), "use_cache": True}

        def read(mask_BT: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
            states = self.model.model(attention_mask=mask_BT, **given, **past).last_hidden_state
            return states[:, -1]

        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        states = [read(mask_BT, input_ids=features["input_ids"], position_ids=positions_BT)]
        for step in range(thoughts):
            head_VD = self.model.get_output_embeddings().weight.float()
            p_BV = functional.linear(states[-1].float(), head_VD).softmax(-1)
            token_BD = (p_BV @ table_VD.float()).to(table_VD.dtype)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], 1)
            soft = {"inputs_embeds": token_BD[:, None], "position_ids": lengths_B1 + step}
            states.append(read(mask_BT, **soft))
        vectors_BD = functional.normalize(torch.stack(states[skipped:]).float().mean(0))
        if not vectors_BD.isfinite().all():
            raise ValueError(f"a vector is not finite: the model overflows {table_VD.dtype}")
        return {**features, "sentence_embedding": vectors_BD}
