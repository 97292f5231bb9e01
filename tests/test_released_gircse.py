"""The preset `gircse`: an adapter of the release's form over Qwen2.5 and Mistral gives the vectors
of a loop in PyTorch that reads, thinks and pools as the released code does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_jax import LatentRetriever
from laser_jax.data.tokenization import train_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch, transformers and peft warn of themselves
    pytest.mark.usefixtures("require_torch"),
]

TASK = "Find the town"
TEXTS = ["Ulm lies on the Danube.", "Kiel?", "Jena lies on the Saale, and Gera on the Elster."]
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "tie_word_embeddings": False,
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(params=["qwen2", "mistral"])
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Base and adapter in `tmp_path`, and the model in PyTorch. Both tokenizers put BOS before a
    prompt by themselves, as Mistral's does."""
    import peft
    import tokenizers
    import torch
    import transformers

    tokenizer = train_tokenizer(TEXTS, 300)
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, vocab_size=len(tokenizer), **SHAPE)
    base = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():  # logits that are not tiny, so that thoughts differ
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    return model


def released_vectors(model: Any, tokenizer: Any, texts: list[str], steps: int) -> np.ndarray:
    """The mean of the states of `steps` soft tokens, the prompt's own left out."""
    import torch

    vectors, table = [], model.get_input_embeddings().weight
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        embeds, states = table[ids], []
        with torch.no_grad():
            for _ in range(steps + 1):
                out = model(inputs_embeds=embeds, output_hidden_states=True)
                states.append(out.hidden_states[-1][0, -1])
                soft = torch.softmax(out.logits[:, -1], dim=-1) @ table
                embeds = torch.cat([embeds, soft[:, None]], dim=1)
        vectors.append(torch.stack(states[1:]).mean(dim=0))
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1).numpy()


def test_vectors_are_those_of_the_released_code(release: Any, tmp_path: Path) -> None:
    retriever = LatentRetriever.from_pretrained(
        tmp_path / "base", adapter=tmp_path / "adapter", preset="gircse"
    )
    tokenizer = retriever.prompts.tokenizer
    plain = LatentRetriever.from_pretrained(tmp_path / "base", preset="gircse")
    for steps in (1, 3, 5):
        found = retriever.encode_document(TEXTS, num_thinking_steps=steps)
        wanted = released_vectors(release, tokenizer, TEXTS, steps)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert np.abs(plain.encode_document(TEXTS, num_thinking_steps=steps) - found).max() > 0.01
    asked = [f"Instruct: {TASK}\nQuery:{text}" for text in TEXTS]
    np.testing.assert_allclose(
        retriever.encode_query(TEXTS, instruction=TASK),
        released_vectors(release, tokenizer, asked, 3),
        atol=1e-5,
    )


def test_long_texts_are_cut_where_the_released_code_cuts_them(release: Any, tmp_path: Path) -> None:
    prompts = LatentRetriever.from_pretrained(tmp_path / "base", preset="gircse").prompts
    long, settings = "Ulm lies. " * 400, {"add_special_tokens": False, "max_length": 512}
    wanted = prompts.tokenizer(long, truncation=True, **settings)["input_ids"]
    assert prompts.document(long) == wanted
    assert len(wanted) == 512
    wanted = prompts.tokenizer(f"Instruct: {TASK}\nQuery:{long}", truncation=True, **settings)
    assert prompts.query(long, TASK) == wanted["input_ids"]
