"""A directory's tokenizer_config.json, of which releases of transformers make different things."""

import json
from pathlib import Path
from typing import Any

from laser_jax.files.durable import write_json
from laser_jax.files.reading import DataError, read_object


class TokenizationError(ValueError):
    """A tokenizer that cannot serve, or a text that cannot become a prompt."""


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, {} where there is none. Raises a TokenizationError where it
    is damaged, or where it or config.json wants code of its own run."""
    values: dict[str, Any] = {}
    for name in ("config.json", "tokenizer_config.json"):
        file = directory / name
        try:
            values = read_object(file) if file.is_file() else {}
        except DataError as error:
            raise TokenizationError(str(error)) from error
        code = values.get("auto_map") or {}
        if code and (not isinstance(code, dict) or "AutoTokenizer" in code):
            raise TokenizationError(
                f"{file}: auto_map names a tokenizer of the model's own code, {code!r}, and "
                "laser_jax runs no code that comes with a model. If tokenizer.json holds the whole "
                "tokenizer, remove auto_map; otherwise save it as a tokenizer.json first"
            )
    return values


def require_effect(config: dict[str, Any], tokenizer: Any, directory: Path) -> None:
    """Raises a TokenizationError where tokenizer_config.json has a BOS or EOS setting that the
    tokenizer does not follow: transformers 5 drops them beside a tokenizer.json, and of 4.x some
    classes do."""
    added = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    does = {"add_bos_token": added[0] == 1, "add_eos_token": added[-1] == 1} if 0 in added else {}
    for key, done in does.items():
        if config.get(key) in (True, False) and config[key] != done:
            wanted = {n: does[n] if config.get(n) is None else config[n] for n in does}
            made = "; ".join(f"tokenizer.{name} = {value}" for name, value in wanted.items())
            raise TokenizationError(
                f"{directory}: tokenizer_config.json says {key}: {str(config[key]).lower()}, and "
                f"tokenizer.json {'adds' if done else 'does not add'} such a token, which versions "
                f"of transformers settle differently. Remove {key} to go by tokenizer.json, or "
                "write it into that: tokenizer = AutoTokenizer.from_pretrained(DIR); "
                f"{made}; tokenizer.save_pretrained(DIR)"
            )


def save_tokenizer(tokenizer: Any, directory: str | Path) -> None:
    """Writes the tokenizer's files so that transformers 4.5x and 5.x load the same one from them.
    Raises an OSError where a file cannot be written."""
    tokenizer.save_pretrained(directory)
    file = Path(directory) / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if tokenizer.is_fast:  # of 5.x; any other class of 4.x may change what tokenizer.json says
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # 4.x wants a dict there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config.setdefault("clean_up_tokenization_spaces", False)  # 4.x would decode to other texts
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])  # 4.x adds types
    write_json(file, config)
