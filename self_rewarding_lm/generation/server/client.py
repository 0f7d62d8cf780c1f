"""Many JSON requests to one server: how many at once, which are tried again, which are given up.

Knows HTTP and its statuses; nothing of prompts, tokens and judgements. The only file that imports
openai, whose client keeps the connections.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from self_rewarding_lm.errors import ConfigError, ServerError
from self_rewarding_lm.generation.server.window import Window
from self_rewarding_lm.runs.installed import install
from self_rewarding_lm.text import amount

logger = logging.getLogger(__name__)


API_KEY_VARIABLE = "OPENAI_API_KEY"


RETRIED = (408, 409, 425, 429)
"""Statuses after which the same request may succeed later, besides all from 500 on."""


BUSY = (425, 429, 503)
"""Statuses of a server that is busy or still loads, whatever it was asked."""


HOPELESS = (401, 403, 404, 405)
"""Statuses that are about the server or our access to it, not about one request."""


CONNECT_SECONDS = 10.0


POLL_SECONDS = 0.5


TURN_SECONDS = 0.05
"""How often a request looks whether it may be sent, after the server was found busy."""


LONGEST_NAMED_WAIT = 300.0
"""Seconds that we wait at most if a server's Retry-After asks for more."""


TRIAL_RETRIES = 1
"""How often a request is repeated that only finds out what a server takes."""


RETRIES_LOGGED_SECONDS = 10.0
"""Seconds after which the log tells of another retry."""


MOST_BYTES = 16 * 2**20
"""Bytes of an answer that are read; a longer one is no answer to what is asked here."""


MOST_ERROR_BYTES = 2**16
"""Bytes of a refusal that are read."""


MOST_REDIRECTS = 3


KEPT_HEADERS = {"content-type", "retry-after"}
"""Headers of an answer that are read."""


MALFORMED = "malformed"
"""The reason of an answer that is none: not of the form that the API has, or without bounds."""


TOO_LONG = re.compile(
    r"context.{0,20}(length|window|size)|max(imum)?[ _]?(model|context|input|seq)|too (long|large)"
    r"|longer than|exceeds?\b.{0,60}\b(length|tokens|limit)"
    r"|max_tokens must be at least 1, got [0-]",  # a prompt that fills vLLM's context
    re.IGNORECASE | re.DOTALL,
)


def missing() -> str:
    """What is said where the package openai is not installed."""
    return f"a server engine and a server judge need the openai package: {install('server')}"


Body = Mapping[str, Any]


Work = Callable[[Callable[[Any], None]], Coroutine[Any, Any, None]]
"""What is done in a thread; it puts its results."""


@dataclass(frozen=True)
class Refusal:
    """A request that gets no answer, however often it is sent.

    reason: one word for the records: `too_long`, `refused_<status>`, `refused_redirect`,
    `malformed`, `gave_up_<status>`, `gave_up_timeout` or `gave_up_connection`.
    """

    reason: str
    message: str

    @property
    def is_final(self) -> bool:
        """Whether the server answered, so that it will say the same again."""
        return not self.reason.startswith("gave_up")


@dataclass(frozen=True)
class _Problem:
    """What went wrong with one try.

    status: None if no answer came. word: the kind of problem then. wait: seconds that the server
    asks to wait. no_server: whether there was no connection at all.
    """

    status: int | None
    word: str
    message: str
    wait: float | None = None
    no_server: bool = False

    @property
    def in_words(self) -> str:
        return f"status {self.status}" if self.status else self.word


class _UnusableError(Exception):
    """An answer that is not read on. refusal: why."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(reason, message)


class HttpClient:
    """Asks one server. url: with or without its /v1.

    timeout: seconds for one whole try, from the connection to the answer's last byte. A try that
    may succeed later (no connection, timeout, status 408, 409, 425, 429, 5xx) is repeated
    `max_retries` times; the waits are first_wait, twice that and so on up to longest_wait, or what
    the server's Retry-After says. window: how many requests may be in flight at once. A redirect is
    followed to the same host only. An answer that is compressed, which is not asked for, or has
    more than MOST_BYTES is not read.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        window: Window | None = None,
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
        self.window = window or Window()
        self.timeout, self.max_retries = timeout, max_retries
        self.first_wait, self.longest_wait = first_wait, longest_wait
        self._answered = self._in_flight = 0
        self._logged_reasons: set[str] = set()
        self._retries_logged_at = -RETRIES_LOGGED_SECONDS

    def ask(
        self, path: str, bodies: Iterable[Body], *, at_once: int | None = None
    ) -> Iterator[tuple[int, Body | Refusal]]:
        """Post bodies; the answer to each with its place, in the order in which they come.

        at_once: how many; by default as many as the window has room for. path: an absolute one is
        not below /v1. Bodies are read as they are sent. Closing the iterator cancels what is in
        flight. Raises ServerError if the server refuses all requests (401, 403, 404, 405), or
        answers none of them however often they are repeated.
        """
        yield from _results(lambda put: self._post_all(path, enumerate(bodies), put, at_once))

    def try_out(self, path: str, body: Body) -> Body | Refusal:
        """The answer to one body that finds out what the server takes.

        It is repeated TRIAL_RETRIES times only, unless the server says that it is busy; the log
        says nothing of a refusal. Raises ServerError if there is no server.
        """
        return _result(lambda put: self._send_once("post", path, put, body=dict(body)))

    def models(self, *, needed: bool) -> dict[str, int | None]:
        """The models that the server lists, and how many tokens each takes if it says so.

        needed: whether it is an error if none is listed. Raises ServerError if there is no server.
        """
        spared = () if needed else HOPELESS  # a gateway may serve a model and list none
        answer = _result(lambda put: self._send_once("get", "/models", put, spared))
        listed = None if isinstance(answer, Refusal) else answer.get("data")
        cards = [card for card in listed if _names_model(card)] if isinstance(listed, list) else []
        if needed and not cards:
            why = f" ({answer.message[:300]})" if isinstance(answer, Refusal) else ""
            raise ConfigError(
                f"the server {self.url} lists no model{why}; give model=, its name there."
            )
        limits = {card["id"]: _limit(card) for card in cards}
        for card in cards:  # an adapter takes what the model takes that it stands on
            if isinstance(parent := card.get("parent"), str):
                limits[card["id"]] = _limit(card) or limits.get(parent)
        return limits

    def logged(self, refusal: Refusal) -> Refusal:
        """The same refusal; the log tells of the first one with its reason."""
        if refusal.reason not in self._logged_reasons:
            self._logged_reasons.add(refusal.reason)
            logger.warning(
                "%s does not answer a request (%s; recorded, more are not shown): %s",
                self.url,
                refusal.reason,
                refusal.message[:500],
            )
        return refusal

    async def _send_once(
        self,
        method: str,
        path: str,
        put: Callable[[Any], None],
        spared: Sequence[int] = (),
        **fields: Any,
    ) -> None:
        async with _open_client(self.url, self.api_key, self.timeout) as client:
            send = partial(getattr(client, method), path, cast_to=object, **fields)
            put(await self._answer(send, is_trial=True, spared=spared))

    async def _post_all(
        self,
        path: str,
        bodies: Iterator[tuple[int, Body]],
        put: Callable[[Any], None],
        at_once: int | None,
    ) -> None:
        async with _open_client(self.url, self.api_key, self.timeout) as client:

            async def work(index: int, body: Body) -> None:
                send = partial(client.post, path, body=dict(body), cast_to=object)
                answer = await self._answer(send)
                put((index, self.logged(answer) if isinstance(answer, Refusal) else answer))

            def end(task: asyncio.Task[None]) -> None:
                running.discard(task)
                ended.append(task)
                some_ended.set()

            window, running = self.window, set[asyncio.Task[None]]()
            ended, some_ended = list[asyncio.Task[None]](), asyncio.Event()
            window.begin()
            try:
                waiting = next(bodies, None)
                while waiting is not None or running or ended:
                    while waiting is not None and len(running) < (at_once or window.size):
                        task = asyncio.create_task(work(*waiting))
                        running.add(task)
                        task.add_done_callback(end)
                        waiting = next(bodies, None)
                    await some_ended.wait()
                    some_ended.clear()
                    while ended:
                        ended.pop().result()  # raises its error
                        if waiting is not None and at_once is None:
                            window.answered(time.monotonic())
            finally:
                left = list(running)
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)

    async def _answer(
        self,
        send: Callable[[], Coroutine[Any, Any, Any]],
        *,
        is_trial: bool = False,
        spared: Sequence[int] = (),
    ) -> Body | Refusal:
        """The answer to one request, after as many tries as it takes.

        spared: statuses that refuse this request alone.
        """
        answered_before, attempt = self._answered, 0
        while True:
            result = await self._in_turn(send)
            if not isinstance(result, _Problem):
                self._answered += 1
                return result
            status = result.status
            if status in HOPELESS and status not in spared:
                raise ServerError(self._message(result, "refuses"))
            if status is not None and status < 500 and status not in RETRIED:
                is_long = status == 413 or TOO_LONG.search(result.message)
                return Refusal("too_long" if is_long else f"refused_{status}", result.message)
            is_quick = is_trial and status not in BUSY
            retries = min(self.max_retries, TRIAL_RETRIES) if is_quick else self.max_retries
            if attempt >= retries:
                break
            if status in BUSY:
                self.window.refused()
            wait = self._wait(attempt, result)
            attempt += 1
            self._log_retry(result, wait, attempt, retries)
            await asyncio.sleep(wait)
        is_lost = result.no_server if is_trial else self._answered == answered_before
        if is_lost:  # there is no server, or no other request was answered meanwhile
            tries = amount(attempt + 1, "try", "tries")
            raise ServerError(self._message(result, f"gave no answer in {tries}"))
        return Refusal(f"gave_up_{status or result.word}", result.message)

    async def _in_turn(
        self, send: Callable[[], Coroutine[Any, Any, Any]]
    ) -> Body | Refusal | _Problem:
        """One try, once fewer requests are in flight than the window has room for."""
        while self._in_flight >= self.window.size:
            await asyncio.sleep(TURN_SECONDS)
        self._in_flight += 1
        try:
            return await _try_once(send, self.timeout)
        finally:
            self._in_flight -= 1

    def _log_retry(self, problem: _Problem, wait: float, retry: int, retries: int) -> None:
        now = time.monotonic()
        if now - self._retries_logged_at < RETRIES_LOGGED_SECONDS:
            return
        self._retries_logged_at = now
        logger.warning(
            "%s: %s (%.200s); tried again in %g s, retry %d of %d",
            self.url,
            problem.in_words,
            problem.message,
            wait,
            retry,
            retries,
        )

    def _wait(self, attempt: int, problem: _Problem) -> float:
        """Seconds before the next try."""
        if problem.wait is not None:
            return min(problem.wait, LONGEST_NAMED_WAIT)
        return min(self.longest_wait, self.first_wait * 2.0**attempt)

    def _message(self, problem: _Problem, does: str) -> str:
        """The message of a ServerError: what the server does, why, and what to do."""
        hints = {
            401: f"Give api_key= or set {API_KEY_VARIABLE}.",
            403: f"Give another api_key= or set {API_KEY_VARIABLE}.",
            404: "Is the url right (without /v1/...), is the model's name one of GET /v1/models, "
            "and does the server offer this path?",
        }
        hint = hints.get(problem.status or 0, "Is it running? Start again to resume from here.")
        words = f"{problem.in_words}): {problem.message[:500]}"
        return f"the server {self.url} {does} ({words}. {hint}"


def _names_model(card: Any) -> bool:
    return isinstance(card, Mapping) and isinstance(card.get("id"), str)


def _limit(card: Mapping[str, Any]) -> int | None:
    """The tokens of prompt and answer together that a listed model takes, if its card says so."""
    limit = card.get("max_model_len")
    return limit if type(limit) is int and limit > 0 else None


def _result(work: Work) -> Any:
    """The one thing that `work` puts."""
    with closing(_results(work)) as results:
        return next(results)


def _results(work: Work) -> Generator[Any, None, None]:
    """What `work` puts, as it comes, worked in a thread; errors are raised here.

    Waits in short turns, so that an interrupt is noticed. Closing the iterator stops the work.
    """
    results: SimpleQueue[Any] = SimpleQueue()
    job = _Job(work(results.put), results.put)
    try:
        job.start()
        while True:
            try:
                result = results.get(timeout=POLL_SECONDS)
            except Empty:
                continue
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        job.stop()


class _Job:
    """A coroutine in a thread with its own event loop, which another thread can stop."""

    def __init__(self, work: Coroutine[Any, Any, None], put: Callable[[Any], None]) -> None:
        self.loop = asyncio.new_event_loop()
        self.task, self.put = self.loop.create_task(work), put
        self.thread = Thread(target=self._run, name="server requests", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Cancel what is not done, and wait until the thread ends."""
        with suppress(RuntimeError):  # the loop is closed: all is done
            self.loop.call_soon_threadsafe(self.task.cancel)
        if self.thread.ident is not None:
            self.thread.join()

    def _run(self) -> None:
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

    class Bounded(openai.DefaultAsyncHttpxClient):
        """Reads no answer without bounds, and follows no redirect to another host."""

        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            """A whole answer, whether or not a stream is asked for."""
            options["follow_redirects"] = False
            response = await super().send(request, stream=True, **options)
            for _ in range(MOST_REDIRECTS):
                following = response.next_request
                if following is None:
                    break
                await response.aclose()
                if following.url.host != request.url.host:
                    raise _UnusableError(
                        "refused_redirect",
                        f"the server redirects to {following.url}, another host; if that is meant, "
                        "give that address as url=",
                    )
                response = await super().send(following, stream=True, **options)
            content = await _bounded(response)
            plain = {name: response.headers[name] for name in KEPT_HEADERS & {*response.headers}}
            return type(response)(
                response.status_code, headers=plain, content=content, request=response.request
            )

    return openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key=api_key or os.environ.get(API_KEY_VARIABLE) or "none",
        timeout=openai.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
        max_retries=0,
        http_client=Bounded(),
        default_headers={"Accept-Encoding": "identity"},
    )


async def _bounded(response: Any) -> bytes:
    """The body of an answer; _UnusableError if it has more bytes than it may have, or is packed."""
    try:
        packed = response.headers.get("content-encoding", "identity")
        if packed != "identity":
            raise _UnusableError(
                MALFORMED, f"the answer is packed ({packed}), which was not asked for"
            )
        most, content = MOST_ERROR_BYTES if response.is_error else MOST_BYTES, bytearray()
        async for piece in response.aiter_raw():
            content += piece
            if len(content) <= most:
                continue
            if response.is_error:
                break
            raise _UnusableError(MALFORMED, f"the answer has more than {most} bytes")
        return bytes(content[:most])
    finally:
        await response.aclose()


def check_openai() -> None:
    """Raise ConfigError if the openai package is not installed, without importing it."""
    if find_spec("openai") is None:
        raise ConfigError(missing())


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ConfigError(missing()) from error
    return openai


async def _try_once(
    send: Callable[[], Coroutine[Any, Any, Any]], timeout: float
) -> Body | Refusal | _Problem:
    """An answer, or what went wrong."""
    openai = _openai()
    try:
        async with asyncio.timeout(timeout):
            answer = await send()
    except _UnusableError as error:
        return error.refusal
    except openai.APIStatusError as error:
        wait = _retry_after(error.response.headers)
        return _Problem(error.status_code, "status", error.response.text[:2000], wait)
    except (TimeoutError, openai.APITimeoutError) as error:
        words = f"no whole answer in {timeout:g} s (timeout)"
        return _Problem(None, "timeout", words, no_server=_has_no_server(error))
    except (openai.APIConnectionError, openai.APIResponseValidationError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        words = f"{error}{cause}"
        return _Problem(None, "connection", words, no_server=_has_no_server(error))
    except RecursionError:
        return Refusal(MALFORMED, "the answer's JSON is nested without end")
    except ValueError as error:  # an answer that breaks off within its JSON
        return _Problem(None, "connection", f"no valid JSON: {error}")
    if isinstance(answer, str):  # its type is not JSON
        return _Problem(None, "connection", f"a JSON object was expected, {answer!r:.200} came")
    if not isinstance(answer, Mapping):
        came = type(answer).__name__
        return Refusal(MALFORMED, f"the answer is no JSON object but of type {came}")
    return answer


def _has_no_server(error: BaseException) -> bool:
    """Whether an error says that there was no connection, by the name that httpx gives it."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")


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
