"""Many JSON requests to one server: how many at once, which are tried again, which are given up.

Knows HTTP and its statuses; nothing of prompts, tokens and judgements. The only file that imports
openai, whose client keeps the connections.
"""

import asyncio
import logging
import os
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from self_rewarding_lm.errors import ConfigError, ServerError

logger = logging.getLogger(__name__)


API_KEY_VARIABLE = "OPENAI_API_KEY"


RETRIED = (408, 409, 425, 429)
"""Statuses after which the same request may succeed later, besides all from 500 on."""


HOPELESS = (401, 403, 404, 405)
"""Statuses that are about the server or our access to it, not about one request."""


CONNECT_SECONDS = 10.0


POLL_SECONDS = 0.5


LONGEST_NAMED_WAIT = 300.0
"""Seconds that we wait at most if a server's Retry-After asks for more."""


TOO_LONG = re.compile(
    r"context.{0,20}(length|window|size)|max(imum)?[ _]?(model|context|input|seq)|too (long|large)"
    r"|longer than|exceeds?\b.{0,60}\b(length|tokens|limit)",
    re.IGNORECASE | re.DOTALL,
)


MISSING = (
    "a server engine and a server judge need the openai package: "
    "pip install 'self-rewarding-lm[server]'"
)


Body = Mapping[str, Any]


@dataclass(frozen=True)
class Refusal:
    """A request that gets no answer, however often it is sent.

    reason: one word for the records: `too_long`, `refused_<status>`, `gave_up_<status>`,
    `gave_up_timeout` or `gave_up_connection`.
    """

    reason: str
    message: str


@dataclass(frozen=True)
class _Problem:
    """What went wrong with one try.

    status: None if no answer came. word: the kind of problem then. wait: seconds that the server
    asks to wait.
    """

    status: int | None
    word: str
    message: str
    wait: float | None = None


class HttpClient:
    """Asks one server. url: with or without its /v1.

    timeout: seconds for one try. A try that may succeed later (no connection, timeout, status 408,
    409, 425, 429, 5xx) is repeated `max_retries` times; the waits are first_wait, twice that and so
    on up to longest_wait, or what the server's Retry-After says.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        max_in_flight: int = 64,
        timeout: float = 600.0,
        max_retries: int = 8,
        first_wait: float = 0.5,
        longest_wait: float = 30.0,
    ) -> None:
        check_openai()
        self.url = url.rstrip("/").removesuffix("/v1")
        if not re.match(r"https?://", self.url):
            raise ConfigError(f"url must begin with http:// or https://; got {url!r}.")
        self.api_key = api_key
        self.max_in_flight, self.timeout, self.max_retries = max_in_flight, timeout, max_retries
        self.first_wait, self.longest_wait = first_wait, longest_wait
        self._answered, self._quiet = 0, False
        self._logged_reasons: set[str] = set()

    def ask(self, path: str, bodies: Iterable[Body]) -> Iterator[tuple[int, Body | Refusal]]:
        """Post bodies; the answer to each with its place, in the order in which they come.

        Bodies are read as they are sent. Closing the iterator cancels what is in flight. Raises
        ServerError if the server refuses all requests (401, 403, 404, 405), or answers none of them
        however often they are repeated.
        """
        results: SimpleQueue[Any] = SimpleQueue()
        job = _Job(self._post_all(path, enumerate(bodies), results.put), results.put)
        job.start()
        try:
            while (result := _next_result(results)) is not None:
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            job.stop()

    def ask_one(self, path: str, body: Body) -> Body | Refusal:
        """The answer to one body; if it is refused the log says nothing."""
        self._quiet = True
        try:
            return next(answer for _, answer in self.ask(path, [body]))
        finally:
            self._quiet = False

    def models(self) -> list[str]:
        """The names of the models that the server lists."""
        results: SimpleQueue[Any] = SimpleQueue()
        job = _Job(self._get("/models", results.put), results.put)
        job.start()
        try:
            answer = _next_result(results)
        finally:
            job.stop()
        if isinstance(answer, BaseException):
            raise answer
        models = answer.get("data") if isinstance(answer, Mapping) else None
        return [str(m["id"]) for m in models or () if isinstance(m, Mapping) and "id" in m]

    async def _get(self, path: str, put: Callable[[Any], None]) -> None:
        async with _open_client(self.url, self.api_key, self.timeout) as client:
            put(await self._answer(lambda: client.get(path, cast_to=object)))

    async def _post_all(
        self, path: str, bodies: Iterator[tuple[int, Body]], put: Callable[[Any], None]
    ) -> None:
        async with _open_client(self.url, self.api_key, self.timeout) as client:

            async def work() -> None:
                for index, body in bodies:  # shared by all: each body goes to one of them
                    content = dict(body)
                    answer = await self._answer(
                        lambda content=content: client.post(path, body=content, cast_to=object)
                    )
                    put((index, answer))

            workers = [asyncio.create_task(work()) for _ in range(self.max_in_flight)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _answer(self, send: Callable[[], Coroutine[Any, Any, Any]]) -> Body | Refusal:
        """The answer to one request, after as many tries as it takes."""
        answered_before, attempt = self._answered, 0
        while True:
            result = await _try_once(send)
            if not isinstance(result, _Problem):
                self._answered += 1
                return result
            status = result.status
            if status in HOPELESS:
                raise ServerError(self._message(result, "refuses"))
            if status is not None and status < 500 and status not in RETRIED:
                return self._refusal(result)
            if attempt >= self.max_retries:
                break
            await asyncio.sleep(self._wait(attempt, result))
            attempt += 1
        if self._answered == answered_before:  # nor was any other request answered meanwhile
            raise ServerError(self._message(result, f"gave no answer in {attempt + 1} tries"))
        return self._logged(Refusal(f"gave_up_{status or result.word}", result.message))

    def _wait(self, attempt: int, problem: _Problem) -> float:
        """Seconds before the next try."""
        if problem.wait is not None:
            return min(problem.wait, LONGEST_NAMED_WAIT)
        return min(self.longest_wait, self.first_wait * 2.0**attempt)

    def _refusal(self, problem: _Problem) -> Refusal:
        is_long = problem.status == 413 or TOO_LONG.search(problem.message)
        reason = "too_long" if is_long else f"refused_{problem.status}"
        return self._logged(Refusal(reason, problem.message))

    def _logged(self, refusal: Refusal) -> Refusal:
        """The same refusal; the log tells of the first one with its reason."""
        if refusal.reason not in self._logged_reasons and not self._quiet:
            self._logged_reasons.add(refusal.reason)
            logger.warning(
                "%s does not answer a request (%s; recorded, more are not shown): %s",
                self.url,
                refusal.reason,
                refusal.message[:500],
            )
        return refusal

    def _message(self, problem: _Problem, does: str) -> str:
        """The message of a ServerError: what the server does, why, and what to do."""
        hints = {
            401: f"Give api_key= or set {API_KEY_VARIABLE}.",
            403: f"Give another api_key= or set {API_KEY_VARIABLE}.",
            404: "Is the url right (without /v1/...), is the model's name one of GET /v1/models, "
            "and does the server offer this path?",
        }
        hint = hints.get(problem.status or 0, "Is it running? Start again to go on from here.")
        status = f"status {problem.status}" if problem.status else problem.word
        return f"the server {self.url} {does} ({status}): {problem.message[:500]}. {hint}"


def _next_result(results: SimpleQueue[Any]) -> Any:
    """Wait for the next result, in short turns, so that an interrupt is noticed."""
    while True:
        with suppress(Empty):
            return results.get(timeout=POLL_SECONDS)


class _Job:
    """A coroutine in a thread with its own event loop, which another thread can stop."""

    def __init__(self, work: Coroutine[Any, Any, None], put: Callable[[Any], None]) -> None:
        self.loop = asyncio.new_event_loop()
        self.work, self.put = work, put
        self.task: asyncio.Task[None] | None = None
        self.thread = Thread(target=self._run, name="server requests", daemon=True)

    def start(self) -> None:
        self.task = self.loop.create_task(self.work)
        self.thread.start()

    def stop(self) -> None:
        """Cancel what is not done, and wait until the thread ends."""
        with suppress(RuntimeError):  # the loop is closed: all is done
            self.loop.call_soon_threadsafe(self.task.cancel)  # type: ignore[union-attr]
        self.thread.join()

    def _run(self) -> None:
        assert self.task is not None
        try:
            self.loop.run_until_complete(self.task)
            self.put(None)
        except BaseException as error:  # raised again where results are waited for
            self.put(error)
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()


def _open_client(url: str, api_key: str | None, timeout: float) -> Any:
    """The openai package's client, without its own retries: `HttpClient` documents ours."""
    openai = _openai()
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key=api_key or os.environ.get(API_KEY_VARIABLE) or "none",
        timeout=openai.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
        max_retries=0,
    )


def check_openai() -> None:
    """Raise ConfigError if the openai package is not installed, without importing it."""
    if find_spec("openai") is None:
        raise ConfigError(MISSING)


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ConfigError(MISSING) from error
    return openai


async def _try_once(send: Callable[[], Coroutine[Any, Any, Any]]) -> Body | _Problem:
    """An answer, or what went wrong."""
    openai = _openai()
    try:
        answer = await send()
    except openai.APIStatusError as error:
        wait = _retry_after(error.response.headers)
        return _Problem(error.status_code, "status", error.response.text[:2000], wait)
    except openai.APITimeoutError as error:
        return _Problem(None, "timeout", str(error))
    except (openai.APIConnectionError, openai.APIResponseValidationError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        return _Problem(None, "connection", f"{error}{cause}")
    except ValueError as error:  # an answer that breaks off within its JSON
        return _Problem(None, "connection", f"no valid JSON: {error}")
    if isinstance(answer, Mapping):
        return answer
    return _Problem(None, "connection", f"a JSON object was expected, {answer!r:.200} came")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, given as a number or as a date; None if it does not."""
    value = headers.get("retry-after")
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        when = parsedate_to_datetime(value)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    return None
