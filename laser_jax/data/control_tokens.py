"""The control tokens of templates, kept apart from the same characters in texts.

A tokenizer makes one token of `<|im_end|>` wherever it stands, so a document that quotes it would
end its own turn. `TextTokenizer` knows the control tokens under secret aliases instead. The
templates' own are replaced by the aliases; in a text the characters are characters.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from laser_jax.data.tokenizer_files import TokenizationError


class TextTokenizer:
    """A tokenizer's backend with its control tokens under aliases.

    Control tokens are the added tokens that are special, and those of the form of a mark, such as
    <think>. Added words and blanks are vocabulary like any other. With `allow_special_tokens` there
    are no aliases, and texts make control tokens too. Raises a TokenizationError where the
    vocabulary does not allow it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, allow_special_tokens: bool) -> None:
        added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
        control = [] if allow_special_tokens else [t.content for t in added if _is_control(t)]
        # Unguessable, so that no text can hold it; the tokens' ids do not depend on it.
        self._secret = secrets.token_hex(8)
        self._aliases = {content: f"{self._secret}:{n};" for n, content in enumerate(control)}
        longest_first = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._hidden = re.compile(rf"{self._secret}\.(\w+);")
        self._backend = _with_aliases(backend, added, self._aliases)
        self._backend.encode_special_tokens = allow_special_tokens and backend.encode_special_tokens
        for content, alias in self._aliases.items():
            if self._backend.token_to_id(alias) != backend.token_to_id(content):
                raise TokenizationError(
                    f"texts cannot be kept apart from the control token {content!r}, whose id "
                    "tokenizer.json gives out of order; set prompt.allow_special_tokens: true"
                )

    def control(self, text: str) -> str:
        """`text`, which is of a template, with its control tokens under their aliases."""
        return self._control.sub(lambda match: self._aliases[match[0]], text)

    def prompt(self, render: Callable[[Mapping[str, str]], str], texts: Mapping[str, str]) -> str:
        """What `render` makes of the named texts, its own control tokens under their aliases.

        It is given placeholders for the texts, with the blanks around them, which templates trim.
        """
        if not self._aliases:
            return render(texts)
        cores = {name: text.strip() for name, text in texts.items()}
        hidden = {
            name: text.replace(cores[name], f"{self._secret}.{name};", 1) if cores[name] else text
            for name, text in texts.items()
        }
        return self._hidden.sub(lambda match: cores[match[1]], self.control(render(hidden)))

    def shown(self, prompt: str) -> str:
        """A prompt with its control tokens under their own names again."""
        for content, alias in self._aliases.items():
            prompt = prompt.replace(alias, content)
        return prompt

    def encode(self, text: str, *, whole: bool) -> tokenizers.Encoding:
        """The tokens of a text or prompt; of a `whole` one also those that the tokenizer adds."""
        return self._backend.encode(text, add_special_tokens=whole)


def _is_control(token: AddedToken) -> bool:
    return token.special or bool(re.fullmatch(r"[<\[{|].+[>\]}|]", token.content, re.DOTALL))


def _with_aliases(
    backend: tokenizers.Tokenizer, added: list[AddedToken], aliases: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """A copy whose added tokens have other names and the same ids. It shares the model, unless that
    has the tokens in its own vocabulary, by which it could make them of a text."""
    model: Any = backend.model
    if any(model.token_to_id(content) is not None for content in aliases):
        state = json.loads(backend.to_str())
        bare = {"version": state["version"], "added_tokens": []}
        bare["model"] = _renamed(state["model"], aliases)
        model = tokenizers.Tokenizer.from_str(json.dumps(bare)).model
    copy = tokenizers.Tokenizer(model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(backend, part) is not None:
            setattr(copy, part, getattr(backend, part))
    kept = ("single_word", "lstrip", "rstrip", "normalized", "special")
    rules = [{name: getattr(token, name) for name in kept} for token in added]
    names = [aliases.get(token.content, token.content) for token in added]
    copy.add_tokens([AddedToken(n, **rule) for n, rule in zip(names, rules, strict=True)])
    return copy


def _renamed(model: dict[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The model of a tokenizer.json with other names for tokens, and no merges that make them."""
    vocab, unknown = model["vocab"], model.get("unk_token")
    pairs = vocab.items() if isinstance(vocab, dict) else vocab
    renamed = [[aliases.get(token, token), value] for token, value in pairs]
    changed: dict[str, Any] = {"vocab": dict(renamed) if isinstance(vocab, dict) else renamed}
    if "merges" in model:
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        hidden = aliases.keys()
        changed["merges"] = [m for m in merges if not hidden & {*m, "".join(m)}]
    if unknown is not None and unknown in aliases:
        changed["unk_token"] = aliases[unknown]
    return {**model, **changed}
