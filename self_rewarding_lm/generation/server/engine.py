"""Generation by an inference server with OpenAI's completions API, which runs or is started here.

The Engine protocol over HTTP: token ids in, token ids out. Knows nothing of stages and records. A
server that is started here serves a folder of weights, saved for it, and is stopped afterwards, or
sleeps until it gets others.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, ServerError, typed
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.score_trie import NodeChances, ScoreTrie
from self_rewarding_lm.generation.server.chances import NodeAsker, check_chances
from self_rewarding_lm.generation.server.client import (
    API_KEY_VARIABLE,
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
from self_rewarding_lm.generation.server.folder import FolderServer
from self_rewarding_lm.generation.server.proof import own_logprobs, rows_of, tokens_of
from self_rewarding_lm.generation.server.reloading import RELOADS, ReloadName
from self_rewarding_lm.generation.server.window import Window
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.models.offloading import off_device
from self_rewarding_lm.records import Ids

logger = logging.getLogger(__name__)


class ServerEngine:
    """Candidates and judgements from an inference server.

    url: a server that is running, with or without its /v1. It keeps its own weights: nothing that
    is trained here reaches it. model: the model's name there, by default the first that is listed.
    launch: a command with {checkpoint} and {port}, such as "vllm serve {checkpoint} --port {port}
    --host 127.0.0.1 --gpu-memory-utilization 0.5". Then each stage starts a server on its own
    weights, saved into `folder`, for its generating and judging, and stops it before training.
    folder: where weights and logs are put, by default a temporary one. reload: "vllm" or "sglang",
    whose server then stays for the whole run: it sleeps while the stage trains, and takes the
    stage's weights before it answers, which is proved by its log-probs of a few tokens beside the
    model's own. offload: whether the model's own weights leave their device while a server that was
    started here has it. max_in_flight: requests at once at most; by default as many as the server
    makes use of, from 64 on. timeout: seconds for one whole try of a request. max_retries: how
    often a try that may succeed later is repeated. start_timeout: seconds within which a started
    server must be healthy, and carry out each command of `reload`. stop_timeout: seconds that it
    has to end before it is killed. top_logprobs: how many of the likeliest tokens are asked for if
    a server cannot give the probabilities of named ones. max_unknown: how much of a probability may
    be unknown then, see `chances`. extra: fields that are put into every request. api_key: by
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
        reload: ReloadName | None = None,
        offload: bool = False,
        api_key: str | None = None,
        max_in_flight: int | None = None,
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
        if (max_in_flight is not None and max_in_flight < 1) or max_retries < 0 or top_logprobs < 1:
            raise ConfigError("max_in_flight and top_logprobs must be >= 1, max_retries >= 0.")
        if launch is None and (reload is not None or offload):
            raise ConfigError(
                "reload and offload are for a server that is started here: give launch= in place "
                "of url=, or leave them out."
            )
        check_openai()
        self.url, self.model, self.launch, self.folder = url, model, launch, folder
        self.reload, self.offload = reload, offload
        self.window, self.extra = Window(max_in_flight), dict(extra)
        self.top_logprobs, self.max_unknown = top_logprobs, max_unknown
        self._api_key, self._timeout, self._max_retries = api_key, timeout, max_retries
        self._started: FolderServer | None = None
        if launch is not None:
            self._started = FolderServer(
                launch,
                folder=folder,
                model=model,
                api_key=api_key or os.environ.get(API_KEY_VARIABLE),
                reload=None if reload is None else RELOADS[reload],
                start_timeout=start_timeout,
                stop_timeout=stop_timeout,
            )
        self._keeps = False
        self._serving: _Serving | None = None
        self._logged: set[str] = set()
        if url is not None:
            self._client(url)

    @contextmanager
    def serving(self, save: Callable[[Path], None], tokens: Tokens) -> Iterator[None]:
        """Around all work that is done with one set of weights.

        The server is started, woken or asked what it can do at the first request, so that a stage
        that has all its records needs none. save: writes the weights and the tokenizer as a folder
        for from_pretrained. Within another `serving` it changes nothing.
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

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around a whole run: with `reload` one server stays from each `serving` to the next.

        It ends when this is left. Without `reload`, or within another `kept`, it changes nothing.
        """
        if self._started is None or self.reload is None or self._keeps:
            yield
            return
        self._keeps = True
        try:
            yield
        finally:
            self._keeps = False
            self._started.stop()

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

    def make_room(self, model: TokenModel) -> None:
        """With `offload`, take the model's weights off its device until `serving` is left."""
        assert self._serving is not None
        self._serving.make_room(model)

    def address(self, model: TokenModel) -> tuple[str, str]:
        """The server's url and the model's name there, for other processes; starts the server."""
        client, served = self._server(model)
        return client.url, served.model

    def join(self, url: str, model: str) -> None:
        """Use, within `serving`, the server that another process started on the same weights."""
        assert self._serving is not None
        self._serving.connect(url, model)

    def rest(self) -> None:
        """Within `serving`, when all is asked: the server that this process started lets go.

        It ends, or sleeps if it is kept. Else that happens when `serving` is left.
        """
        assert self._serving is not None
        self._serving.rest()

    def generate(
        self, model: TokenModel, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, Completion]]:
        """Completions as they come, each with the index of its request.

        model: whose weights are served; only its log-probs are used, as `reload` says.
        The seed of a request is its key's lowest 31 bits. If the server gives no token ids, the
        text is encoded once (`tokens` is "re-encoded"). A request that it will never answer, or
        with something that is no answer, gives a completion without ids that names the reason. A
        server with a shorter context than the model's has the last word on the length.
        """
        check_sampling(decoding)
        if not requests:
            return
        client, served = self._server(model)
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
        """For each row of ids, with its index, what follows each inner node of the trie after it.

        One request for each node. If the server can, the probabilities of the children are asked
        for by id. Otherwise they are looked up among the `top_logprobs` likeliest tokens, and
        missing ones are scored as the last token of a prompt if the server can do that. A child
        that is still unknown counts 0 if it cannot have more than `max_unknown` (it has at most
        what the least likely returned token has); if it can, the row's chances are NaN, and its
        score None. Raises ConfigError if the server gives no log-probs with token ids.
        """
        if not rows:
            return
        client, served = self._server(model)
        check_chances(served.abilities)
        asker = NodeAsker(client, served, trie, longer, self.top_logprobs, self.max_unknown)
        yield from asker.ask(rows)

    def _server(self, model: TokenModel) -> tuple[HttpClient, ServedModel]:
        """The server of a model's weights, started if need be; ServerError outside of `serving`."""
        if self._serving is None:
            raise ServerError(
                "ServerEngine was asked outside of `with engine.serving(save, tokens):`, which "
                "says whose weights are served."
            )
        return self._serving.ready(model)

    def _client(self, url: str) -> HttpClient:
        return HttpClient(
            url,
            api_key=self._api_key,
            window=self.window,
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
        self._has_room = self._is_ours = False

    def require(self, decoding: Decoding, chances: bool) -> None:
        """Check what will be asked: now if a server is running, else once it is."""
        self._needs.append((decoding, chances))
        if self._connection is not None:
            self._check(*self._connection, [(decoding, chances)])
        elif self.engine.url is not None:
            self.connect(self.engine.url, self.engine.model)

    def ready(self, model: TokenModel) -> tuple[HttpClient, ServedModel]:
        """The server and its model, after starting it or finding out what it can do."""
        if self._connection is not None:
            return self._connection
        if self.engine.url is not None:
            return self.connect(self.engine.url, self.engine.model)
        return self._begin(model)

    def make_room(self, model: TokenModel) -> None:
        """With `offload`, the model's weights leave its device."""
        if self.engine.offload and not self._has_room:
            self.stack.enter_context(off_device(model.module))
            self._has_room = True

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

    def rest(self) -> None:
        """The server that this process has begun to use ends, or sleeps until the next weights."""
        started = self.engine._started
        if not self._is_ours or started is None:
            return
        self._is_ours = False
        if self.engine._keeps:
            started.sleep()
        else:
            started.stop()

    def _begin(self, model: TokenModel) -> tuple[HttpClient, ServedModel]:
        """Have the model's present weights served, and prove that they are."""
        engine, started = self.engine, self.engine._started
        assert started is not None
        # 1. the model's own log-probs, while it is on its device; then the device is the server's
        own = None if engine.reload is None else own_logprobs(model)
        self.make_room(model)
        self.stack.push(self._end)
        # 2. the server with these weights
        self._is_ours = True
        try:
            client, served = self.connect(*started.give(self.save))
            # 3. what it says with them
            if own is not None and started.reload is not None:
                rows, tokens = rows_of(model), tokens_of(model)
                started.proof.check(own, started.reload.logprobs(client, served, rows, tokens))
        except BaseException:
            self._connection = None
            raise
        return client, served

    def _end(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """At the end of `serving`; after an error nothing more is asked of the server."""
        if error is None:
            self.rest()
        elif self._is_ours and self.engine._started is not None:
            self.engine._started.stop()

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
