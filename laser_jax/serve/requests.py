"""The bodies of requests: what a client may ask for, and what is wrong with what it sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import orjson

from laser_jax.data.tokenization import PromptTokenizer, TokenizationError

InputType = Literal["query", "document"]
_EMBEDDING_FIELDS = (
    *("model", "input", "encoding_format", "dimensions", "user"),
    *("thinking_steps", "input_type", "instruction", "truncate"),
)
_SEARCH_FIELDS = ("model", "query", "k", "thinking_steps", "instruction", "truncate")


class RequestError(Exception):
    """A request that is refused, with what its answer says.

    Attributes:
        status: of HTTP.
        message: what was expected, and how to mend it.
        param: the field that is at fault; None where it is none.
        code: a short name of the fault, for programs.
        retry_after: seconds after which the same request may be taken; None where never.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str = "invalid_value",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        named = {"param": self.param, "code": self.code}
        return {"error": {"message": self.message, "type": kind, **named}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and what stands in for what it leaves out."""

    name: str
    """Of the model. `NAME:query` and `NAME:document` say the `input_type` too."""
    dimension: int
    """Of the model's vectors."""
    thinking_steps: int
    """The model's K."""
    document_thinking_steps: int
    """The model's K of documents."""
    max_thinking_steps: int
    max_rows: int
    instruction: str | None
    """For queries that bring none."""
    max_k: int = 1
    """Documents that a search may ask for."""


@dataclass(frozen=True)
class EmbeddingRequest:
    """The body of `POST /v1/embeddings`."""

    model: str
    """As the client wrote it."""
    input: tuple[str | list[int], ...]
    """Texts, or token ids of texts."""
    input_type: InputType
    instruction: str
    thinking_steps: int
    dimensions: int
    encoding_format: Literal["float", "base64"]
    truncate: bool
    """Shorten what does not fit, instead of refusing it."""


@dataclass(frozen=True)
class SearchRequest:
    """The body of `POST /v1/search`."""

    queries: tuple[str, ...]
    instruction: str
    thinking_steps: int
    k: int
    truncate: bool


# --- parsing -----------------------------------------------------------------------------------


def parse_embedding(body: bytes, limits: Limits, needs_instruction: bool) -> EmbeddingRequest:
    """The request that a body holds. `needs_instruction` is whether the prompt of queries has a
    place for one. Raises a RequestError."""
    values = _object(body, _EMBEDDING_FIELDS)
    model, role = _model(values, limits)
    given = _choice(values, "input_type", ("query", "document"), role)
    if given is None:
        raise RequestError(
            "input_type is missing: this model embeds queries and documents by different prompts. "
            f'Send "query" or "document", or ask for the model "{limits.name}:query" or '
            f'"{limits.name}:document"',
            "input_type",
            code="missing",
        )
    if role not in (None, given):
        raise RequestError(f"input_type is {given!r}, and the model's name says {role!r}")
    texts = _input(values.get("input"), limits)
    input_type: InputType = "query" if given == "query" else "document"
    instruction = ""
    if input_type == "query":
        instruction = _instruction(values, limits, needs_instruction)
    elif values.get("instruction") is not None:
        raise RequestError("documents are embedded without an instruction", "instruction")
    base64 = _choice(values, "encoding_format", ("float", "base64"), "float") == "base64"
    return EmbeddingRequest(
        model=model,
        input=texts,
        input_type=input_type,
        instruction=instruction,
        thinking_steps=_steps(values, limits, input_type),
        dimensions=_integer(values, "dimensions", limits.dimension, limits.dimension),
        encoding_format="base64" if base64 else "float",
        truncate=_boolean(values, "truncate"),
    )


def parse_search(body: bytes, limits: Limits, needs_instruction: bool) -> SearchRequest:
    """The request that a body holds; as `parse_embedding`."""
    values = _object(body, _SEARCH_FIELDS)
    if "model" in values:
        _model(values, limits)
    query = values.get("query")
    if not isinstance(query, str | list):
        raise RequestError("query must be a text, or a list of texts", "query")
    queries = _input([query] if isinstance(query, str) else query, limits, "query")
    for place, text in enumerate(queries):
        if not isinstance(text, str):
            raise RequestError(f"query[{place}] must be a text", "query")
    return SearchRequest(
        queries=tuple(str(text) for text in queries),
        instruction=_instruction(values, limits, needs_instruction),
        thinking_steps=_steps(values, limits, "query"),
        k=_integer(values, "k", limits.max_k, min(10, limits.max_k)),
        truncate=_boolean(values, "truncate"),
    )


def _object(body: bytes, known: tuple[str, ...]) -> dict[str, Any]:
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    if unknown := sorted(values.keys() - set(known)):
        named = ", ".join(known)
        raise RequestError(
            f"unknown field {unknown[0]!r:.80}; there are {named}", unknown[0][:80], code="unknown"
        )
    return values


def _model(values: dict[str, Any], limits: Limits) -> tuple[str, str | None]:
    """The model's name as sent, and the input type that it says."""
    name = values.get("model")
    if not isinstance(name, str):
        raise RequestError(f"model must be a text: {limits.name!r}", "model", code="missing")
    base, _, role = name.rpartition(":")
    if name == limits.name:
        return name, None
    if base == limits.name and role in ("query", "document"):
        return name, role
    raise RequestError(
        f"there is no model {name!r:.80}; this server has {limits.name!r}",
        "model",
        status=404,
        code="model_not_found",
    )


def _input(value: Any, limits: Limits, field: str = "input") -> tuple[str | list[int], ...]:
    """The rows of a field: a text, token ids, or a list of either."""
    ids = isinstance(value, list) and bool(value) and _is_token_id(value[0])
    rows = [value] if isinstance(value, str) or ids else value
    if not isinstance(rows, list) or not rows:
        raise RequestError(
            f"{field} must be a text, a list of token ids, or a list of either that is not empty",
            field,
        )
    if len(rows) > limits.max_rows:
        raise RequestError(
            f"{field} has {len(rows)} rows, and a request may have {limits.max_rows}: send them in "
            "several requests",
            field,
            code="too_many_rows",
        )
    for place, row in enumerate(rows):
        if isinstance(row, str) and row.strip():
            continue
        if isinstance(row, list) and row and all(map(_is_token_id, row)):
            continue
        empty = "is empty" if row in ([], None) or isinstance(row, str) else ""
        problem = empty or "must be a text or a list of token ids"
        raise RequestError(f"{field}[{place}] {problem}", field)
    return tuple(rows)


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _instruction(values: dict[str, Any], limits: Limits, needed: bool) -> str:
    instruction = values.get("instruction")
    if instruction is None:
        instruction = limits.instruction
    if instruction is None and needed:
        raise RequestError(
            "instruction is missing: this model's queries are prompted with the task in words; "
            'send it, or "" for none (a server can be started with --instruction)',
            "instruction",
            code="missing",
        )
    if not isinstance(instruction or "", str):
        raise RequestError("instruction must be a text", "instruction")
    return instruction or ""


def _steps(values: dict[str, Any], limits: Limits, input_type: InputType) -> int:
    own = limits.thinking_steps if input_type == "query" else limits.document_thinking_steps
    return _integer(values, "thinking_steps", limits.max_thinking_steps, own)


def _integer(values: dict[str, Any], name: str, most: int, default: int) -> int:
    value = values.get(name)
    if value is None:
        return default
    if not _is_token_id(value) or not 1 <= value <= most:
        raise RequestError(f"{name} must be a whole number in 1..{most}, got {value!r:.40}", name)
    return value


def _boolean(values: dict[str, Any], name: str) -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {value!r:.40}", name)
    return value


def _choice(
    values: dict[str, Any], name: str, choices: tuple[str, ...], default: str | None
) -> str | None:
    value = values.get(name)
    if value is None:
        return default
    if value not in choices:
        listed = " or ".join(map(repr, choices))
        raise RequestError(f"{name} must be {listed}, got {value!r:.40}", name)
    return value


# --- to tokens ---------------------------------------------------------------------------------


def token_rows(
    prompts: PromptTokenizer,
    texts: tuple[str | list[int], ...],
    input_type: InputType,
    instruction: str,
    *,
    truncate: bool,
    field: str = "input",
) -> list[list[int]]:
    """The prompts of a request's texts, as token ids. Token ids are read as the text that they
    stand for. Raises a RequestError, which names the row, on one that does not fit."""
    vocabulary = len(prompts.tokenizer)
    rows = []
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            beyond = next((id_ for id_ in text if not 0 <= id_ < vocabulary), None)
            if beyond is not None:
                raise RequestError(
                    f"{field}[{place}] holds the token id {beyond}, and this model's are "
                    f"0..{vocabulary - 1}: were they made by another tokenizer? Send texts",
                    field,
                )
            text = str(prompts.tokenizer.decode(text, clean_up_tokenization_spaces=False))
        try:
            if input_type == "query":
                tokens = prompts.query_prompt(text, instruction)
            else:
                tokens = prompts.document_prompt(text)
        except TokenizationError as error:
            raise RequestError(f"{field}[{place}]: {error}", field) from error
        if tokens.truncated and not truncate:
            limit: int = getattr(prompts.config, f"{input_type}_max_length")
            raise RequestError(
                f"{field}[{place}] takes {tokens.whole_length} tokens with its prompt, and a "
                f'{input_type} may have {limit}: shorten it, or send "truncate": true',
                field,
                code="context_length_exceeded",
            )
        rows.append(tokens.ids)
    return rows
