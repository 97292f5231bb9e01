"""Chat templates that fail or change texts."""

from __future__ import annotations

import re

import pytest

from laser_jax.config import PromptConfig
from laser_jax.data.tokenization import PromptTokenizer, TokenizationError, train_tokenizer

USER = "{{ messages[0]['content'] }}"


def prompts(template: str, **settings) -> PromptTokenizer:
    tokenizer = train_tokenizer(["Ulm lies on the Danube."], 300)
    tokenizer.chat_template = template
    return PromptTokenizer(tokenizer, PromptConfig(**settings))


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('a system turn is wanted') }}", "a system turn is wanted"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ messages[0].content.nothing.more }}", "UndefinedError"),
        ("{{ messages[5]['content'] + 1 }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_is_refused_by_name_at_once(template, reason, allow) -> None:
    with pytest.raises(TokenizationError, match=f"chat template fails .*{re.escape(reason)}"):
        prompts(template, allow_special_tokens=allow)


@pytest.mark.parametrize("filter_", ["upper", "replace('\\n', ' ')", "e", "tojson"])
def test_a_template_that_changes_texts_needs_them_whole(filter_) -> None:
    template = f"{{{{ messages[0]['content'] | {filter_} }}}}"
    with pytest.raises(TokenizationError, match=r"prompt\.allow_special_tokens: true"):
        prompts(template)
    allowed = prompts(template, allow_special_tokens=True, thinking_suffix="")
    assert allowed.document("a\nb") == allowed.text_ids(allowed.document_prompt_text("a\nb"))


def test_a_template_may_trim_texts() -> None:
    made = prompts("<|im_start|>{{ messages[0]['content'] | trim }}")
    assert made.document(" a <think>\n") == made.document("a <think>")
