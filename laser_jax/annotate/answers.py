"""What an endpoint has answered, and what in it should not teach."""

import re
from dataclasses import dataclass

from laser_jax.data.schema import TrainingRow, same_text

_QUOTE, _SHORTEST_QUOTE = 60, 20
_REFUSAL = re.compile(
    r"\W*(unfortunately,? )?("
    r"(i['’]?m|i am) (so |very |really )?(sorry|unable|not able)|i apologi[sz]e"
    r"|sorry,? (but )?(i|we)\b|(i|we) (can['’]?t|cannot|can not|won['’]?t)\b|as an ai\b)"
)


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt, a line of the journal. Counts of tokens are None where the endpoint
    has none; `model` is the endpoint's name for it, which may be more exact than what was asked
    for; `seconds` are those of the request that succeeded."""

    prompt_hash: str
    model: str
    text: str
    finish_reason: str | None = None
    """The endpoint's `stop`, `length`, `content_filter` ..., or our `rejected`."""
    refusal: bool = False
    """The endpoint itself calls the text a refusal."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0


def marks_of(answer: Answer, row: TrainingRow) -> list[str]:
    """Why an answer should not teach: the endpoint `rejected` the prompt, the answer is `empty`, a
    `refusal`, stopped by a `content_filter` or `cut` by the limit of tokens, or it has a `quote`:
    60 characters, or all of a passage of 20 to 60, that are a positive passage's and not the
    query's (by `same_text`)."""
    faults = {
        "rejected": answer.finish_reason == "rejected",
        "empty": not answer.text.strip(),
        "refusal": answer.refusal or bool(_REFUSAL.match(same_text(answer.text))),
        "content_filter": answer.finish_reason == "content_filter",
        "cut": answer.finish_reason == "length",
        "quote": any(_quotes(answer.text, row.query, text) for text in row.positive_passages),
    }
    return [name for name, is_at_fault in faults.items() if is_at_fault]


def _quotes(answer: str, query: str, passage: str) -> bool:
    answer, query, passage = map(same_text, (answer, query, passage))
    size = min(len(passage), _QUOTE)
    windows = {passage[i : i + size] for i in range(len(passage) - size + 1)}
    shared = windows.intersection(answer[i : i + size] for i in range(len(answer) - size + 1))
    return size >= _SHORTEST_QUOTE and any(window not in query for window in shared)
