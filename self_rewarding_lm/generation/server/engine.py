"""Generation by an inference server with OpenAI's completions API, which runs or is started here.

The Engine protocol over HTTP: token ids in, token ids out. Knows nothing of stages and records. A
server that is started here serves one folder of weights, saved for it, and is stopped afterwards.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, ServerError, typed
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.score_trie import NodeChances, ScoreTrie
from self_rewarding_lm.generation.server.chances import NodeAsker, check_chances
from self_rewarding_lm.generation.server.client import (
    MALFORMED,
    Body,
    HttpClient,
    Refusal,
    check_openai,
)
from self_rewarding_lm.generation.server.completions import (
    PATH,
    RE_ENCODED,
    MalformedAnswerError,
    ServedModel,
    check_sampling,
    find_abilities,
    try_settings,
)
from self_rewarding_lm.generation.server.process import LaunchedServer, check_command
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.records import Ids

logger = logging.getLogger(__name__)


class ServerEngine:
    """Candidates and judgements from an inference server.

    url, model: a server that is running, with or without its /v1, and the model's name there (by
    default the first that it lists). It keeps its own weights: nothing that is trained here reaches
    it. launch: a command with {checkpoint} and {port}, such as "vllm serve {checkpoint} --port
    {port} --host 127.0.0.1 --gpu-memory-utilization 0.5". Then each stage starts a server on its
    own weights, saved into `folder` (by default a temporary one), for its generating and judging,
    and stops it before training. max_in_flight: requests at once. timeout: seconds for one whole
    try of a request. max_retries: how often a try that may succeed later is repeated.
    start_timeout: seconds within which a started server must be healthy. stop_timeout: seconds that
    it has to end before it is killed. top_logprobs: how many of the likeliest tokens are asked for
    if a server cannot give the probabilities of named ones. max_unknown: how much of a probability
    may be unknown then, see `chances`. extra: fields that are put into every request. api_key: by
    default OPENAI_API_KEY.

    Raises ConfigError unless exactly one of url and launch is given.
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
        self._serving: _Serving | None = None
        self._logged: set[str] = set()
        if url is not None:
            self._client(url)

    @contextmanager
    def serving(self, save: Callable[[Path], None], tokens: Tokens) -> Iterator[None]:
        """Around all work that is done with one set of weights.

        The server is started, or asked what it can do, at the first request, so that a stage that
        has all its records starts none. save: writes the weights and the tokenizer as a folder for
        from_pretrained. Within another `serving` it changes nothing.
        """
        if self._serving is not None:
            yield
            return
        with ExitStack() as stack:
            self._serving = _Serving(self, save, tokens, stack)
            try:
                yield
            finally:
                self._serving = None

    @property
    def is_serving(self) -> bool:
        """Whether it is within `serving`."""
        return self._serving is not None

    def check(self, decoding: Decoding, *, chances: bool) -> None:
        """Raise ConfigError if the server cannot do what a Decoding asks, or give chances.

        chances: whether the probabilities of scores will be asked for. What no server can do raises
        at once, within `serving` also what a running server cannot do, or refuses when it is asked
        for one token. A server that is still to be started is checked as soon as it answers.
        """
        check_sampling(decoding)
        if self._serving is not None:
            self._serving.require(decoding, chances)

    def address(self) -> tuple[str, str]:
        """The server's url and the model's name there, for other processes; starts the server."""
        client, served = self._server()
        return client.url, served.model

    def join(self, url: str, model: str) -> None:
        """Use, within `serving`, the server that another process started on the same weights."""
        assert self._serving is not None
        self._serving.connect(url, model)

    def generate(
        self, model: TokenModel, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, Completion]]:
        """Completions as they come, each with the index of its request; `model` is not used.

        The seed of a request is its key's lowest 31 bits. If the server gives no token ids, the
        text is encoded once (`tokens` is "re-encoded"). A request that it will never answer, or
        with something that is no answer, gives a completion without ids that names the reason. A
        server with a shorter context than the model's has the last word on the length.
        """
        check_sampling(decoding)
        if not requests:
            return
        client, served = self._server()
        served.check(decoding)
        places: list[int] = []
        unasked: list[tuple[int, Refusal]] = []

        def bodies() -> Iterator[Body]:
            for index, request in enumerate(requests):
                body = served.body(request, decoding)
                if isinstance(body, Refusal):
                    unasked.append((index, body))
                else:
                    places.append(index)
                    yield body

        for place, answer in client.ask(PATH, bodies()):
            request = requests[places[place]]
            try:
                completion = served.completion(answer, request, decoding)
            except MalformedAnswerError as problem:
                refusal = client.logged(Refusal(MALFORMED, str(problem)))
                completion = Completion((), None, reason=refusal.reason)
            if completion.max_new_tokens is not None:
                self._log_once(
                    f"the server takes {served.max_len} tokens (max_model_len): answers are "
                    "shortened to what a prompt leaves of them"
                )
            if completion.tokens == RE_ENCODED:
                self._log_once(
                    "the server gives no token ids: its answers are encoded once, and that is what "
                    "is trained on (tokens: re-encoded)"
                )
            yield places[place], completion
        for index, refusal in unasked:
            yield index, Completion((), None, reason=client.logged(refusal).reason)

    def chances(
        self, model: TokenModel, rows: Sequence[Ids], trie: ScoreTrie, longer: frozenset[int]
    ) -> Iterator[tuple[int, dict[Ids, NodeChances]]]:
        """For each row of ids, with its index, what follows each inner node of the trie behind it.

        One request for each node. If the server can, the probabilities of the children are asked
        for by id. Otherwise they are looked up among the `top_logprobs` likeliest tokens, and
        missing ones are scored as the last token of a prompt if the server can do that. A child
        that is still unknown counts 0 if it cannot have more than `max_unknown` (it has at most
        what the least likely returned token has); if it can, the row's chances are NaN, and its
        score None. Raises ConfigError if the server gives no log-probs with token ids.
        """
        if not rows:
            return
        client, served = self._server()
        check_chances(served.abilities)
        asker = NodeAsker(client, served, trie, longer, self.top_logprobs, self.max_unknown)
        yield from asker.ask(rows)

    def _server(self) -> tuple[HttpClient, ServedModel]:
        """The server, started if need be; ServerError outside of `serving`."""
        if self._serving is None:
            raise ServerError(
                "ServerEngine was asked outside of `with engine.serving(save, tokens):`, which "
                "says whose weights are served."
            )
        return self._serving.ready()

    def _client(self, url: str) -> HttpClient:
        return HttpClient(
            url,
            api_key=self._api_key,
            max_in_flight=self.max_in_flight,
            timeout=self._timeout,
            max_retries=self._max_retries,
        )

    def _log_once(self, words: str) -> None:
        """Log a warning, unless it was logged before."""
        if words not in self._logged:
            self._logged.add(words)
            logger.warning(words)


class _Serving:
    """One `with engine.serving(...)`. stack: closes what is opened for it."""

    def __init__(
        self,
        engine: ServerEngine,
        save: Callable[[Path], None],
        tokens: Tokens,
        stack: ExitStack,
    ) -> None:
        self.engine, self.save, self.tokens, self.stack = engine, save, tokens, stack
        self._connection: tuple[HttpClient, ServedModel] | None = None
        self._needs: list[tuple[Decoding, bool]] = []
        self._tried: list[Decoding] = []

    def require(self, decoding: Decoding, chances: bool) -> None:
        """Check what will be asked: now if a server is running, else once it is."""
        self._needs.append((decoding, chances))
        if self.engine.launch is None or self._connection is not None:
            self._check(*self.ready(), [(decoding, chances)])

    def ready(self) -> tuple[HttpClient, ServedModel]:
        """The server and its model, after starting it or finding out what it can do."""
        if self._connection is None:
            engine = self.engine
            url, model = (engine.url, engine.model) if engine.launch is None else self._launch()
            assert url is not None
            return self.connect(url, model)
        return self._connection

    def connect(self, url: str, model: str | None) -> tuple[HttpClient, ServedModel]:
        """The server at an address and its model, after finding out what they can do."""
        engine = self.engine
        client = engine._client(url)
        limits = client.models(needed=model is None)
        model = model or next(iter(limits))
        abilities = find_abilities(client, model, self.tokens, engine.extra)
        logger.info("%s: %s", url, abilities.in_words())
        served = ServedModel(model, self.tokens, abilities, engine.extra, limits.get(model))
        self._check(client, served, self._needs)
        self._connection = client, served
        return self._connection

    def _check(
        self, client: HttpClient, served: ServedModel, needs: Sequence[tuple[Decoding, bool]]
    ) -> None:
        """Raise ConfigError if the server has no field for a setting, or refuses its value."""
        for decoding, chances in needs:
            served.check(decoding)
            if chances:
                check_chances(served.abilities)
            settings = replace(decoding, is_stop=None)
            if settings not in self._tried:
                try_settings(client, served, settings)
                self._tried.append(settings)

    def _launch(self) -> tuple[str, str]:
        """Start a server on the present weights; its address and the model's name there."""
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
