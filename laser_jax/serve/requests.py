"""The bodies of requests: what a client may ask for, and what is wrong with what it sent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from laser_jax.data.tokenization import PromptTokenizer, TokenizationError
from laser_jax.settings import ConfigError, check

InputType = Literal["query", "document"]
_SHARED = {"model": str, "thinking_steps": int | None, "instruction": str | None, "truncate": bool}
_EMBEDDING_FIELDS = _SHARED | {
    "input": Any,
    "input_type": InputType | None,
    "dimensions": int | None,
    "encoding_format": Literal["float", "base64"] | None,
    "user": Any,
}
_SEARCH_FIELDS = _SHARED | {"query": Any, "k": int | None}


class RequestError(Exception):
    """A request that is refused, with what its answer says: the `status` of HTTP, a `message` of
    what was expected and how to mend it, the field (`param`) at fault if it is one, a short name of
    the fault for programs (`code`), and `retry_after` so many seconds, or None for never."""

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
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        said = {"message": self.message, "type": kinds.get(self.status, usual)}
        return {"error": {**said, "param": self.param, "code": self.code}}


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
    needs_instruction: bool
    """Whether queries must bring one."""
    max_k: int = 1
    """Documents that a search may ask for."""

    @property
    def models(self) -> dict[str, InputType | None]:
        """The names that a request may give, and the input type that each says."""
        roles: tuple[InputType, ...] = ("query", "document")
        return {self.name: None, **{f"{self.name}:{role}": role for role in roles}}

    def role_of(self, model: str) -> InputType | None:
        """The input type that a model's name says. Raises a RequestError on another model's."""
        if model not in self.models:
            text = f"there is no model {model!r:.80}; this server has {self.name!r}"
            raise RequestError(text, "model", status=404, code="model_not_found")
        return self.models[model]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is to be embedded."""

    rows: list[str | list[int]]
    """Texts, or token ids of texts."""
    field: str = "query"
    """Where they stood, for messages."""
    input_type: InputType = "query"
    instruction: str
    thinking_steps: int
    truncate: bool
    """Shorten what does not fit, instead of refusing it."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest(Texts):
    """The body of `POST /v1/embeddings`."""

    model: str
    """As the client wrote it."""
    dimensions: int
    base64: bool


@dataclass(frozen=True, kw_only=True)
class SearchRequest(Texts):
    """The body of `POST /v1/search`."""

    k: int


def parse_embedding(body: bytes, limits: Limits) -> EmbeddingRequest:
    """The request that a body holds. Raises a RequestError."""
    values = _object(body, _EMBEDDING_FIELDS)
    if "model" not in values:
        raise RequestError(f"model must be a text: {limits.name!r}", "model", code="missing")
    role = limits.role_of(values["model"])
    input_type: InputType | None = values.get("input_type") or role
    if input_type is None:
        raise RequestError(
            "input_type is missing: this model embeds queries and documents by different prompts. "
            f'Send "query" or "document", or ask for the model "{limits.name}:query" or '
            f'"{limits.name}:document"',
            "input_type",
            code="missing",
        )
    if role not in (None, input_type):
        text = f"input_type is {input_type!r}, and the model's name says {role!r}"
        raise RequestError(text, "input_type")
    if input_type == "document" and values.get("instruction") is not None:
        raise RequestError("documents are embedded without an instruction", "instruction")
    return EmbeddingRequest(
        model=values["model"],
        rows=_rows(values, "input", limits),
        field="input",
        input_type=input_type,
        instruction=_instruction(values, limits) if input_type == "query" else "",
        thinking_steps=_steps(values, limits, input_type),
        dimensions=_integer(values, "dimensions", limits.dimension, limits.dimension),
        base64=values.get("encoding_format") == "base64",
        truncate=values.get("truncate", False),
    )


def parse_search(body: bytes, limits: Limits) -> SearchRequest:
    """The request that a body holds. Raises a RequestError."""
    values = _object(body, _SEARCH_FIELDS)
    if "model" in values:
        limits.role_of(values["model"])
    query = values.get("query")
    if not isinstance(query, str | list):
        raise RequestError("query must be a text, or a list of texts", "query")
    for place, text in enumerate([] if isinstance(query, str) else query):
        if not isinstance(text, str):
            raise RequestError(f"query[{place}] must be a text", "query")
    return SearchRequest(
        rows=_rows(values, "query", limits),
        instruction=_instruction(values, limits),
        thinking_steps=_steps(values, limits, "query"),
        k=_integer(values, "k", limits.max_k, min(10, limits.max_k)),
        truncate=values.get("truncate", False),
    )


def _object(body: bytes, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of a body, whose known `fields` have values of their types."""
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    for name, value in values.items():
        if name not in fields:
            text = f"unknown field {name!r:.80}; there are {', '.join(fields)}"
            raise RequestError(text, name[:80], code="unknown")
        try:
            check(fields, {name: value})
        except ConfigError as error:
            raise RequestError(str(error), name) from error
    return values


def _rows(values: dict[str, Any], field: str, limits: Limits) -> list[str | list[int]]:
    """The rows of a field: a text, token ids, or a list of either."""
    value = values.get(field)
    ids = isinstance(value, list) and bool(value) and type(value[0]) is int
    rows: Any = [value] if isinstance(value, str) or ids else value
    if not isinstance(rows, list) or not rows:
        wanted = "a text, a list of token ids, or a list of either that is not empty"
        raise RequestError(f"{field} must be {wanted}", field)
    if len(rows) > limits.max_rows:
        text = f"{field} has {len(rows)} rows, and a request may have {limits.max_rows}"
        mend = "send them in several requests"
        raise RequestError(f"{text}: {mend}", field, code="too_many_rows")
    for place, row in enumerate(rows):
        ids = row if isinstance(row, list) else []
        if not isinstance(row, str | list) or any(type(id_) is not int for id_ in ids):
            wanted = "must be a text or a list of token ids"
            raise RequestError(f"{field}[{place}] {wanted}", field)
    return rows


def _instruction(values: dict[str, Any], limits: Limits) -> str:
    instruction = values.get("instruction")
    if instruction is None and limits.needs_instruction:
        raise RequestError(
            "instruction is missing: this model's queries are prompted with the task in words; "
            'send it, or "" for none (a server can be started with --instruction)',
            "instruction",
            code="missing",
        )
    return (limits.instruction or "") if instruction is None else instruction


def _steps(values: dict[str, Any], limits: Limits, input_type: InputType) -> int:
    own = limits.thinking_steps if input_type == "query" else limits.document_thinking_steps
    return _integer(values, "thinking_steps", limits.max_thinking_steps, own)


def _integer(values: dict[str, Any], name: str, most: int, default: int) -> int:
    value = values.get(name)
    if value is not None and not 1 <= value <= most:
        raise RequestError(f"{name} must be a whole number in 1..{most}, got {value!r:.40}", name)
    return default if value is None else value


def token_rows(prompts: PromptTokenizer, asked: Texts) -> list[list[int]]:
    """The prompts of a request's texts, as token ids. Token ids are read as the text that they
    stand for. Raises a RequestError, which names the row, on one that does not fit."""
    vocabulary, field = len(prompts.tokenizer), asked.field
    rows = []
    for place, row in enumerate(asked.rows):
        where, ids = f"{field}[{place}]", row if isinstance(row, list) else []
        if beyond := [id_ for id_ in ids if not 0 <= id_ < vocabulary]:
            raise RequestError(
                f"{where} holds the token id {beyond[0]}, and this model's are 0..{vocabulary - 1}"
                ": were they made by another tokenizer? Send texts",
                field,
            )
        text = row
        if not isinstance(row, str):
            text = prompts.tokenizer.decode(row, clean_up_tokenization_spaces=False)
        if not str(text).strip():
            raise RequestError(f"{where} is empty", field)
        try:
            if asked.input_type == "query":
                tokens = prompts.query_prompt(str(text), asked.instruction)
            else:
                tokens = prompts.document_prompt(str(text))
        except TokenizationError as error:
            at_fault = "instruction" if asked.instruction else field  # it left no room for the text
            raise RequestError(f"{where}: {error}", at_fault) from error
        if tokens.truncated and not asked.truncate:
            limit: int = getattr(prompts.config, f"{asked.input_type}_max_length")
            raise RequestError(
                f"{where} takes {tokens.whole_length} tokens with its prompt, and a "
                f'{asked.input_type} may have {limit}: shorten it, or send "truncate": true',
                field,
                code="context_length_exceeded",
            )
        rows.append(tokens.ids)
    return rows
