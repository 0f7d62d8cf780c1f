"""Many JSON requests to one server: how many are in flight, what is tried again, what is given up.

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
"""Statuses besides all from 500 on with which the same request may succeed later."""


HOPELESS = (401, 403, 404, 405)
"""Statuses that say something of the server or of our access, not of one request."""


CONNECT_SECONDS = 10.0


LOOK_SECONDS = 0.5


LONGEST_NAMED_WAIT = 300.0
"""Seconds at most that a server's Retry-After is followed."""


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
    """A request that has no answer and never will. reason: one word for the records: `too_long`,
    `refused_<status>`, `gave_up_<status>`, `gave_up_timeout` or `gave_up_connection`."""

    reason: str
    message: str


@dataclass(frozen=True)
class _Problem:
    """What went wrong with one try. status: None where no answer came."""

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
        self._said: set[str] = set()

    def ask(self, path: str, bodies: Iterable[Body]) -> Iterator[tuple[int, Body | Refusal]]:
        """The answer to each body that is posted, with its place, as they come; each exactly once.

        Bodies are taken as they are sent. Closing the iterator cancels what is in flight. Raises
        ServerError where the server refuses all requests (401, 403, 404), or answers none of them
        however often they are repeated.
        """
        results: SimpleQueue[Any] = SimpleQueue()
        job = _Job(self._post_all(path, enumerate(bodies), results.put), results.put)
        job.start()
        try:
            while (result := _taken(results)) is not None:
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            job.stop()

    def ask_one(self, path: str, body: Body) -> Body | Refusal:
        """The answer to one body, which may well be refused: the log says nothing of it."""
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
            found = _taken(results)
        finally:
            job.stop()
        if isinstance(found, BaseException):
            raise found
        listed = found.get("data") if isinstance(found, Mapping) else None
        return [str(one["id"]) for one in listed or () if isinstance(one, Mapping) and "id" in one]

    async def _get(self, path: str, put: Callable[[Any], None]) -> None:
        async with _open(self.url, self.api_key, self.timeout) as client:
            put(await self._tried(lambda: client.get(path, cast_to=object)))

    async def _post_all(
        self, path: str, bodies: Iterator[tuple[int, Body]], put: Callable[[Any], None]
    ) -> None:
        async with _open(self.url, self.api_key, self.timeout) as client:

            async def work() -> None:
                for index, body in bodies:  # shared by all: each body goes to one of them
                    content = dict(body)
                    answer = await self._tried(
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

    async def _tried(self, send: Callable[[], Coroutine[Any, Any, Any]]) -> Body | Refusal:
        """One request's answer, however many tries it takes."""
        answered, attempt = self._answered, 0
        while True:
            found = await _try(send)
            if not isinstance(found, _Problem):
                self._answered += 1
                return found
            if found.status in HOPELESS:
                raise ServerError(self._in_words(found, "refuses"))
            if found.status is not None and found.status < 500 and found.status not in RETRIED:
                return self._refusal(found)
            if attempt >= self.max_retries:
                break
            await asyncio.sleep(self._wait(attempt, found))
            attempt += 1
        if self._answered == answered:  # no request at all was answered meanwhile
            raise ServerError(self._in_words(found, f"gave no answer in {attempt + 1} tries"))
        return self._told(Refusal(f"gave_up_{found.status or found.word}", found.message))

    def _wait(self, attempt: int, problem: _Problem) -> float:
        if problem.wait is not None:
            return min(problem.wait, LONGEST_NAMED_WAIT)
        return min(self.longest_wait, self.first_wait * 2.0**attempt)

    def _refusal(self, problem: _Problem) -> Refusal:
        is_long = problem.status == 413 or TOO_LONG.search(problem.message)
        reason = "too_long" if is_long else f"refused_{problem.status}"
        return self._told(Refusal(reason, problem.message))

    def _told(self, refusal: Refusal) -> Refusal:
        """The refusal, after a word in the log the first time that its reason comes."""
        if refusal.reason not in self._said and not self._quiet:
            self._said.add(refusal.reason)
            logger.warning(
                "%s does not answer a request (%s; recorded, more are not shown): %s",
                self.url,
                refusal.reason,
                refusal.message[:500],
            )
        return refusal

    def _in_words(self, problem: _Problem, does: str) -> str:
        hints = {
            401: f"Give api_key= or set {API_KEY_VARIABLE}.",
            403: f"Give another api_key= or set {API_KEY_VARIABLE}.",
            404: "Is the url right (without /v1/...), is the model's name one of GET /v1/models, "
            "and does the server offer this path?",
        }
        hint = hints.get(problem.status or 0, "Is it running? Start again to go on from here.")
        status = f"status {problem.status}" if problem.status else problem.word
        return f"the server {self.url} {does} ({status}): {problem.message[:500]}. {hint}"


def _taken(results: SimpleQueue[Any]) -> Any:
    """The next result; an interrupt is noticed while there is none."""
    while True:
        with suppress(Empty):
            return results.get(timeout=LOOK_SECONDS)


class _Job:
    """A coroutine in a thread with a loop of its own, which can be stopped from outside."""

    def __init__(self, work: Coroutine[Any, Any, None], put: Callable[[Any], None]) -> None:
        self.loop = asyncio.new_event_loop()
        self.work, self.put = work, put
        self.task: asyncio.Task[None] | None = None
        self.thread = Thread(target=self._run, name="server requests", daemon=True)

    def start(self) -> None:
        self.task = self.loop.create_task(self.work)
        self.thread.start()

    def stop(self) -> None:
        """Cancel what is not done, and wait for the end of the thread."""
        with suppress(RuntimeError):  # the loop is closed: all is done
            self.loop.call_soon_threadsafe(self.task.cancel)  # type: ignore[union-attr]
        self.thread.join()

    def _run(self) -> None:
        assert self.task is not None
        try:
            self.loop.run_until_complete(self.task)
            self.put(None)
        except BaseException as error:  # whoever waits for results must hear of it
            self.put(error)
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()


def _open(url: str, api_key: str | None, timeout: float) -> Any:
    """The openai package's client; its own repeats are off, ours can be foretold."""
    openai = _openai()
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key=api_key or os.environ.get(API_KEY_VARIABLE) or "none",
        timeout=openai.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
        max_retries=0,
    )


def check_openai() -> None:
    """Raise ConfigError where the openai package is not installed; imports nothing."""
    if find_spec("openai") is None:
        raise ConfigError(MISSING)


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ConfigError(MISSING) from error
    return openai


async def _try(send: Callable[[], Coroutine[Any, Any, Any]]) -> Body | _Problem:
    openai = _openai()
    try:
        found = await send()
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
    if isinstance(found, Mapping):
        return found
    return _Problem(None, "connection", f"a JSON object was expected, {found!r:.200} came")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait; they may be written as a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        when = parsedate_to_datetime(value)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    return None
