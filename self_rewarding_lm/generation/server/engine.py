"""Generation by an inference server that speaks OpenAI's completions API, running or started here.

The Engine protocol over HTTP: token ids in, token ids out. Knows nothing of stages and records. A
server that it starts serves one folder of weights, saved for it, and is gone afterwards.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, ServerError, typed
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.score_trie import NodeChances, ScoreTrie
from self_rewarding_lm.generation.server.chances import NodeAsker, check_chances
from self_rewarding_lm.generation.server.client import Body, HttpClient, check_openai
from self_rewarding_lm.generation.server.completions import (
    PATH,
    RE_ENCODED,
    Speaker,
    check_sampling,
    find_abilities,
)
from self_rewarding_lm.generation.server.process import LaunchedServer, check_command
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.records import Ids

logger = logging.getLogger(__name__)


class ServerEngine:
    """Candidates and judgements from an inference server.

    url, model: a server that is running, with or without its /v1, and the model's name there
    (default: the first that it lists). It keeps its own weights: nothing that is trained here
    reaches it. launch: a command with {checkpoint} and {port}, such as "vllm serve {checkpoint}
    --port {port}". Then each stage's generating and judging starts a server on the stage's own
    weights, saved into `folder` (default: a temporary one), and stops it before training.
    max_in_flight: requests at once. timeout: seconds for one try of a request; max_retries: how
    often a try that may succeed later is repeated. start_timeout, stop_timeout: seconds until a
    started server must be healthy, and those that it has to end before it is killed.
    top_logprobs: how many of the likeliest tokens are asked for where a server cannot name the
    probabilities of given ones; max_unknown: how much of a probability may be unknown then, see
    `chances`. extra: fields that are put into every request. api_key: default OPENAI_API_KEY.

    Raises ConfigError where neither or both of url and launch are given.
    """

    @typed
    def __init__(
        self,
        *,
        url: str | None = None,
        model: str | None = None,
        launch: str | None = None,
        api_key: str | None = None,
        max_in_flight: int = 64,
        timeout: float = 600.0,
        max_retries: int = 8,
        start_timeout: float = 600.0,
        stop_timeout: float = 30.0,
        folder: str | Path | None = None,
        top_logprobs: int = 20,
        max_unknown: float = 1e-3,
        extra: Mapping[str, Any] = {},
    ) -> None:
        if (url is None) == (launch is None):
            raise ConfigError(
                "ServerEngine takes url=, the address of a running server, or launch=, the command "
                f"that starts one; {'neither' if url is None else 'both'} came."
            )
        if max_in_flight < 1 or max_retries < 0 or top_logprobs < 1:
            raise ConfigError("max_in_flight and top_logprobs must be >= 1, max_retries >= 0.")
        check_openai()
        if launch is not None:
            check_command(launch)
        self.url, self.model, self.launch, self.folder = url, model, launch, folder
        self.max_in_flight, self.extra = max_in_flight, dict(extra)
        self.start_timeout, self.stop_timeout = start_timeout, stop_timeout
        self.top_logprobs, self.max_unknown = top_logprobs, max_unknown
        self._api_key, self._timeout, self._max_retries = api_key, timeout, max_retries
        self._session: _Session | None = None
        self._told: set[str] = set()
        if url is not None:
            self._client(url)

    @contextmanager
    def serving(self, save: Callable[[Path], None], tokens: Tokens) -> Iterator[None]:
        """Around all work that is done with one set of weights.

        The server is started, or found out about, at the first request, so that a stage whose
        records are all there starts none. save: writes the weights and the tokenizer as a folder
        for from_pretrained. Within another `serving` it changes nothing.
        """
        if self._session is not None:
            yield
            return
        with ExitStack() as stack:
            self._session = _Session(self, save, tokens, stack)
            try:
                yield
            finally:
                self._session = None

    @property
    def is_serving(self) -> bool:
        """Whether it is within `serving`."""
        return self._session is not None

    def check(self, decoding: Decoding, *, chances: bool) -> None:
        """Raise ConfigError where settings, or the probabilities of scores, are not to be had.

        What no server can do is known at once. For the rest a running server is asked (within
        `serving`); of one that is still to be started it is checked as soon as that answers.
        """
        check_sampling(decoding)
        if self._session is not None:
            self._session.need(decoding, chances)

    def address(self) -> tuple[str, str]:
        """The server's url and the model's name there, for another process; it is started."""
        client, speaker = self._opened()
        return client.url, speaker.model

    def join(self, url: str, model: str) -> None:
        """Use, within `serving`, the server that another process started on the same weights."""
        assert self._session is not None
        self._session.found_at(url, model)

    def generate(
        self, model: TokenModel, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, Completion]]:
        """Completions as they come, each with its request's index; `model` is the server's.

        The seed of a request is its key's lowest 31 bits. Where the server gives no token ids the
        text is encoded once (`tokens` "re-encoded"). A request that it will never answer is a
        completion without ids that names the reason.
        """
        check_sampling(decoding)
        if not requests:
            return
        client, speaker = self._opened()
        speaker.check(decoding)
        places: list[int] = []
        unwritten: list[int] = []

        def bodies() -> Iterator[Body]:
            for index, request in enumerate(requests):
                body = speaker.body(request, decoding)
                if body is None:
                    unwritten.append(index)
                else:
                    places.append(index)
                    yield body

        for place, answer in client.ask(PATH, bodies()):
            completion = speaker.completion(answer, decoding)
            if completion.tokens == RE_ENCODED:
                self._tell(
                    "the server gives no token ids: its answers are encoded once, and that is what "
                    "is trained on (tokens: re-encoded)"
                )
            yield places[place], completion
        for index in unwritten:
            self._tell("some prompts have ids that no text gives, and the server takes texts only")
            yield index, Completion((), None, reason="no_text")

    def chances(
        self, model: TokenModel, rows: Sequence[Ids], trie: ScoreTrie, longer: frozenset[int]
    ) -> Iterator[tuple[int, dict[Ids, NodeChances]]]:
        """For each row of ids, with its index, what follows each inner node of the trie behind it.

        One request a node. The probabilities of the children are asked for by id where the server
        can do that. Else they are looked up among the `top_logprobs` likeliest tokens, and those
        that are missing are scored as a prompt's last token where it can do that. A child that is
        still unknown counts 0 where it cannot have more than `max_unknown` (it has at most what
        the least likely returned token has); otherwise the row's chances are NaN, and its score
        None. Raises ConfigError where the server gives no log-probs with token ids.
        """
        if not rows:
            return
        client, speaker = self._opened()
        check_chances(speaker.abilities)
        asker = NodeAsker(client, speaker, trie, longer, self.top_logprobs, self.max_unknown)
        yield from asker.ask(rows)

    def _opened(self) -> tuple[HttpClient, Speaker]:
        if self._session is None:
            raise ServerError(
                "ServerEngine was asked outside of `with engine.serving(save, tokens):`, which "
                "says whose weights are served."
            )
        return self._session.ready()

    def _client(self, url: str) -> HttpClient:
        return HttpClient(
            url,
            api_key=self._api_key,
            max_in_flight=self.max_in_flight,
            timeout=self._timeout,
            max_retries=self._max_retries,
        )

    def _tell(self, words: str) -> None:
        """Say something once."""
        if words not in self._told:
            self._told.add(words)
            logger.warning(words)


class _Session:
    """One `serving`: what is open is closed with its stack."""

    def __init__(
        self,
        engine: ServerEngine,
        save: Callable[[Path], None],
        tokens: Tokens,
        stack: ExitStack,
    ) -> None:
        self.engine, self.save, self.tokens, self.stack = engine, save, tokens, stack
        self._found: tuple[HttpClient, Speaker] | None = None
        self._needs: list[tuple[Decoding, bool]] = []

    def need(self, decoding: Decoding, chances: bool) -> None:
        """Check it, now where a server is there, else once it is."""
        self._needs.append((decoding, chances))
        if self.engine.launch is None or self._found is not None:
            _check(self.ready()[1], [(decoding, chances)])

    def ready(self) -> tuple[HttpClient, Speaker]:
        """The server, started if that is to be done, and how it is spoken to."""
        if self._found is None:
            engine = self.engine
            url, model = (engine.url, engine.model) if engine.launch is None else self._launched()
            assert url is not None
            return self.found_at(url, model)
        return self._found

    def found_at(self, url: str, model: str | None) -> tuple[HttpClient, Speaker]:
        """A server at an address, after a look at what it can do."""
        engine = self.engine
        client = engine._client(url)
        model = model or _first_model(client)
        abilities = find_abilities(client, model, self.tokens, engine.extra)
        logger.info("%s: %s", url, abilities.in_words())
        speaker = Speaker(model, self.tokens, abilities, engine.extra)
        _check(speaker, self._needs)
        self._found = client, speaker
        return self._found

    def _launched(self) -> tuple[str, str]:
        """The address of a new server on the present weights, and the model's name there."""
        engine = self.engine
        assert engine.launch is not None
        if engine.folder is not None:
            Path(engine.folder).mkdir(parents=True, exist_ok=True)
        work = Path(mkdtemp(prefix="served-", dir=engine.folder))
        checkpoint = work / "model"
        self.stack.callback(shutil.rmtree, checkpoint, ignore_errors=True)
        checkpoint.mkdir()
        self.save(checkpoint)
        server = LaunchedServer(
            engine.launch,
            checkpoint.absolute(),
            start_timeout=engine.start_timeout,
            stop_timeout=engine.stop_timeout,
        )
        self.stack.callback(server.stop)
        server.start()
        return server.url, engine.model or str(server.checkpoint)


def _check(speaker: Speaker, needs: Sequence[tuple[Decoding, bool]]) -> None:
    for decoding, chances in needs:
        speaker.check(decoding)
        if chances:
            check_chances(speaker.abilities)


def _first_model(client: HttpClient) -> str:
    found = client.models()
    if not found:
        raise ConfigError(f"the server {client.url} lists no model; give model=, its name there.")
    return found[0]
