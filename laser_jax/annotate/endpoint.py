"""An OpenAI-compatible endpoint: a prompt in, an answer out, with patience for its bad moments."""

import asyncio
import hashlib
import logging
import random
import time
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from laser_jax.annotate.answers import Answer
from laser_jax.settings import build

KEY_VARIABLE = "OPENAI_API_KEY"
_ATTEMPTS, _LONGEST_BACKOFF, _LONGEST_WAIT, _LONGEST_ANSWER = 8, 60.0, 600.0, 600.0
_HINTS = {
    401: f"set the environment variable {KEY_VARIABLE} to a valid key",
    403: "the key has no right to this model or place",
    404: "--base_url often ends in /v1, and --model is a name that the endpoint knows",
}
_log = logging.getLogger(__name__)


class EndpointError(ValueError):
    """An endpoint that cannot be used, or not now. Names it and what came."""


def hash_of(prompt: str) -> str:
    """What stands for a prompt in the journal."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


class Endpoint:
    """`POST {base_url}/chat/completions`, while `client` is open."""

    def __init__(self, base_url: str, body: dict[str, Any], key: str) -> None:
        """`body` is what a request holds beside its prompt: `model`, `max_tokens` ...; `key` may
        be empty."""
        self._url, self._body, self._key = f"{base_url.rstrip('/')}/chat/completions", body, key
        self._has_answered = False
        self.client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(600, connect=20),
            limits=httpx2.Limits(max_connections=None),
        )

    async def ask(self, prompt: str) -> Answer:
        """The answer to a prompt. Waits and asks again, up to 8 times in all, where the endpoint is
        busy, fails, hangs up or takes longer than ten minutes. Raises an EndpointError where it
        refuses the key, the model or the place (401, 403, 404), answers with something else than a
        chat completion, goes on failing, asks for more than ten minutes of patience, or rejects
        (400, 413, 422) the first prompt that it decides on."""
        fault, asked = "", {"messages": [{"role": "user", "content": prompt}], "stream": False}
        for attempt in range(_ATTEMPTS):
            began, body, asked_for = time.monotonic(), self._body, None
            try:
                async with asyncio.timeout(_LONGEST_ANSWER):  # one that comes in drops, too
                    response = await self.client.post(self._url, json=body | asked)
            except (httpx2.RequestError, TimeoutError) as error:
                fault = f"{type(error).__name__} {error}"
            else:
                fault = self._shown(response)
                if answer := self._answer(response, body, fault):
                    self._has_answered, seconds = True, round(time.monotonic() - began, 3)
                    return replace(answer, prompt_hash=hash_of(prompt), seconds=seconds)
                asked_for = retry_after(response.headers.get("Retry-After", ""))
            backoff = min(2.0**attempt, _LONGEST_BACKOFF) * random.uniform(0.5, 1)
            wait = backoff if asked_for is None else asked_for
            if wait > _LONGEST_WAIT:
                raise EndpointError(f"{self._url} is to be asked again in {wait:.0f} s: {fault}")
            if attempt + 1 < _ATTEMPTS:
                _log.info("%s: %s; asking again in %.1f s", self._url, fault, wait)
                await asyncio.sleep(wait)
        raise EndpointError(f"{self._url} failed {_ATTEMPTS} times, at last with {fault}")

    def _answer(self, response: httpx2.Response, body: dict[str, Any], shown: str) -> Answer | None:
        """What a response to `body` says; None where asking again may help. Raises as `ask`."""
        status = response.status_code
        if status == 200:
            return self._completion(response, shown)
        if status in (408, 409, 425, 429) or status >= 500:
            return None
        if status == 400 and "max_tokens" in body and "max_completion_tokens" in response.text:
            limit = {"max_completion_tokens": body["max_tokens"]}  # OpenAI's newer models
            self._body = limit | {k: v for k, v in body.items() if k != "max_tokens"}
            return None
        if status in (400, 413, 422) and self._has_answered:
            _log.info("%s rejects a prompt: %s", self._url, shown)
            reason = "content_filter" if '"content_filter"' in response.text else "rejected"
            return Answer("", body["model"], "", reason)
        hint = _HINTS.get(status, "a chat completion is wanted; see --base_url and --model")
        raise EndpointError(f"{self._url} answered {shown}: {hint}")

    def _completion(self, response: httpx2.Response, shown: str) -> Answer:
        try:
            found = response.json()
            choice, usage = found["choices"][0], found.get("usage") or {}
            refusal, content = (choice["message"].get(key) for key in ("refusal", "content"))
            # half a surrogate pair, of a character that was cut, becomes "?"
            text = (content or refusal or "").encode(errors="replace").decode()
            values = {"model": found.get("model") or self._body["model"], "refusal": bool(refusal)}
            values |= {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens")}
            values |= {"finish_reason": choice.get("finish_reason"), "text": text}
            return build(Answer, {"prompt_hash": "", **values})
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise EndpointError(
                f"{self._url} answered with no chat completion but {shown}: see --base_url"
            ) from error

    def _shown(self, response: httpx2.Response) -> str:
        """What came, for a message: without the key, should the endpoint repeat it."""
        text = " ".join(response.text.split())
        text = text.replace(self._key, "[API key]") if self._key else text
        kind = response.headers.get("Content-Type", "of no type")
        return f"status {response.status_code}, {kind}, {text[:300]!r}"


def retry_after(value: str) -> float | None:
    """The seconds of a Retry-After header, a number or an HTTP date; None where it is neither."""
    if value.strip().isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
