"""A judge behind an address: another, larger model that is asked in words.

It reads texts, so it may have any tokenizer. Knows judge prompts and how answers are read; nothing
of the policy's weights.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from self_rewarding_lm.config import (
    DEFAULT_REWARD_CONFIG,
    ComparisonConfig,
    RewardConfig,
    SamplingConfig,
)
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import ConfigError, setting, typed
from self_rewarding_lm.generation.server.client import MALFORMED, Body, HttpClient, Refusal
from self_rewarding_lm.generation.server.completions import (
    ENDED_BY,
    NEUTRAL_FIELDS,
    SEED_BITS,
    MalformedAnswerError,
    cut_behind_stop,
    first_choice,
    mapping_of,
    refused_settings,
    text_of,
)
from self_rewarding_lm.generation.server.window import Window
from self_rewarding_lm.judges.asking import Question
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.parsing import VerdictForm
from self_rewarding_lm.judges.self_judge import (
    PairwiseJudge,
    SelfJudge,
    form_of,
    form_of_comparison,
)
from self_rewarding_lm.records import Candidate, Judgement, Prompt, stable_hash

PATH = "/chat/completions"


TRIAL_TEXT = "Hello"


OUT_OF_TOKENS = "output limit was reached"
"""In what OpenAI's models say if they still think when their tokens are used up."""


ENDED = ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "tool_calls", "function_call")
"""Words for the end (`finish_reason`) of an answer that ended by itself."""


CUT = ("length", "max_tokens")
"""Words for the end of one that was cut off. All others, as content_filter, say it was broken."""


class ServerJudge(Judge):
    """A model on an OpenAI-compatible server judges (the LLM annotator of arXiv:2402.04792).

    As `rewarding_model` of a self-reward stage it uses the stage's reward prompts (or comparison),
    `judging` and number of judgements. As `judge=` of any stage it uses those given here.

    model: its name on the server; default the first that the server lists. reward: default the
    library's. sampling: default temperature 0.7, top-p 0.9. All settings are sent by vLLM's names,
    neutral ones too; a server that refuses those gets top_k, min_p, min_new_tokens and
    repetition_penalty only if they are set. num_judgements: of each candidate, each with its own
    seed. extra: fields of every request that replace others; a field that is None is left out.
    name: in the judgements; default the model's. api_key: default OPENAI_API_KEY. max_in_flight,
    timeout, max_retries: as for ServerEngine.

    Scores are read in the model's text. Raises ConfigError for expected and forced scores, which
    need the policy's own tokens, for filter_fn and stop_fn, and at the first request for settings
    that the server refuses.
    """

    reads_weights = False

    @typed
    def __init__(
        self,
        *,
        url: str,
        model: str | None = None,
        reward: RewardConfig | None = None,
        sampling: SamplingConfig | None = None,
        num_judgements: int = 1,
        name: str | None = None,
        api_key: str | None = None,
        max_in_flight: int | None = None,
        timeout: float = 600.0,
        max_retries: int = 8,
        extra: Mapping[str, Any] = {},
    ) -> None:
        if num_judgements < 1:
            raise ConfigError(f"num_judgements must be 1 or more; got {num_judgements}.")
        self.client = HttpClient(
            url,
            api_key=api_key,
            window=Window(max_in_flight),
            timeout=timeout,
            max_retries=max_retries,
        )
        self.model, self.extra = model, dict(extra)
        self.name = name or model or "server"
        self.num_judgements = num_judgements
        reward = reward or DEFAULT_REWARD_CONFIG
        self._own = self.scoring(reward, sampling or SamplingConfig(), num_judgements)

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterable[Judgement]:
        return self._own.judge(ctx, prompts, candidates_PG)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        """Ids of all judgements of one prompt's candidates."""
        return self._own.judgement_ids(candidates)

    def scoring(
        self,
        reward: RewardConfig,
        sampling: SamplingConfig,
        num_judgements: int,
        *,
        name: str | None = None,
        first: int = 0,
    ) -> SelfJudge:
        """The judge that scores with a reward prompt. Raises ConfigError as the class does."""
        _check(reward, sampling)
        name = name or self.name
        asker = ServerAsker(self, form_of(reward), sampling, name=name)
        return SelfJudge(reward, sampling, num_judgements, name=name, first=first, asker=asker)

    def comparing(self, comparison: ComparisonConfig, sampling: SamplingConfig) -> PairwiseJudge:
        """The judge that compares two candidates. Raises ConfigError as the class does."""
        _check(comparison, sampling)
        form = form_of_comparison(comparison)
        asker = ServerAsker(self, form, sampling, name=self.name, source="compared")
        return PairwiseJudge(comparison, sampling, name=self.name, asker=asker)


class ServerAsker:
    """Asks the model of a ServerJudge. form: how the model states what it decides."""

    def __init__(
        self,
        server: ServerJudge,
        form: VerdictForm,
        sampling: SamplingConfig,
        *,
        name: str,
        source: str = "sampled",
    ) -> None:
        self.server, self.form, self.sampling = server, form, sampling
        self.name, self.source = name, source
        self._fields: Body | None = None

    def ask(self, ctx: Context, questions: Sequence[Question]) -> Iterator[Judgement]:
        """A judgement for each question, in any order; its score is None if the server refuses."""
        if not questions:
            return
        model = self._model()
        if self._fields is None:
            self._fields = self._accepted_fields(model)
        fields = self._fields
        bodies = (self._body(question, model, ctx.seed, fields) for question in questions)
        for place, answer in self.server.client.ask(PATH, bodies):
            yield self._judgement(questions[place], answer, ctx.format)

    def _model(self) -> str:
        """The model's name; ConfigError if the server lists none."""
        server = self.server
        if server.model is None:
            server.model = next(iter(server.client.models(needed=True)))
        return server.model

    def _accepted_fields(self, model: str) -> Body:
        """The sampling settings as the server takes them, found out with one token.

        Raises ConfigError with its words if it takes them in no way.
        """
        s, client = self.sampling, self.server.client
        asked = {
            "top_k": s.top_k,
            "min_p": s.min_p,
            "min_tokens": s.min_new_tokens or None,
            "repetition_penalty": None if s.repetition_penalty == 1.0 else s.repetition_penalty,
        }
        set_ones = {name: value for name, value in asked.items() if value is not None}
        stays = {"include_stop_str_in_output": True, "no_stop_trim": True} if s.stop else {}
        for fields in ({**NEUTRAL_FIELDS, **set_ones, **stays}, set_ones):
            trial = {**self._body(Question("trial", (), TRIAL_TEXT), model, 0, fields)}
            for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
                if name in trial:
                    trial[name] = min(trial[name], 1)
            answer = client.try_out(PATH, trial)
            if not isinstance(answer, Refusal) or OUT_OF_TOKENS in answer.message:
                return fields
        if answer.is_final:
            raise refused_settings(client, s, answer)
        return set_ones  # it may answer later

    def _body(self, question: Question, model: str, seed: int, fields: Body) -> Body:
        """The request for one judgement; the seed is a function of `seed` and its id."""
        s = self.sampling
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question.text}],
            "max_tokens": s.max_new_tokens,
            "temperature": s.temperature,
            "top_p": 1.0 if s.top_p is None else s.top_p,
            "stop": list(s.stop) or None,
            "seed": stable_hash(seed, question.id) & (2**SEED_BITS - 1),
            **fields,
            **self.server.extra,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _text(self, choice: Mapping[str, Any]) -> str:
        """What an answer says, with the stop text that ended it, which the server may leave out.

        Raises MalformedAnswerError if it is no text.
        """
        text = text_of(mapping_of(choice.get("message")).get("content"))
        for ended_by in (choice.get(name) for name in ENDED_BY):
            if isinstance(ended_by, str) and not text.endswith(ended_by):
                text += text_of(ended_by)
        return cut_behind_stop(text, self.sampling.stop)

    def _judgement(self, question: Question, answer: Body | Refusal, run_format: int) -> Judgement:
        """The judgement in a server's answer, or the reason why there is no score."""
        text, score, reason, finished = None, None, None, None
        if isinstance(answer, Refusal):
            reason = answer.reason
        else:
            choice = first_choice(answer) or {}
            word = choice.get("finish_reason") if run_format > 1 else None
            finished = word in ENDED if isinstance(word, str) else None
            try:
                text = self._text(choice) or None
            except MalformedAnswerError as problem:
                reason = self.server.client.logged(Refusal(MALFORMED, str(problem))).reason
            if text is None:
                reason = reason or ("unfinished" if finished is False else "empty")
            elif finished is False and word not in CUT:  # a filter or a fault broke it off
                reason = "unfinished"
            else:
                form, known = self.form.of(run_format), True if run_format == 1 else finished
                parsed = form.read_answer(text, known)
                score, reason = parsed.score, parsed.reason
        return Judgement(
            id=question.id,
            candidate_ids=question.candidate_ids,
            judge=self.name,
            score=score,
            reason=reason,
            text=text,
            source=self.source,
            finished=finished,
        )


def _check(prompt: RewardConfig | ComparisonConfig, sampling: SamplingConfig) -> None:
    """Raise ConfigError for settings that no server can follow."""
    if prompt.score_mode == "expected" or prompt.forced_ending:
        raise ConfigError(
            "a ServerJudge reads what the model says; its tokens are not the policy's, so expected "
            f"and forced scores cannot be computed. Use {setting('score_mode', 'sampled')} without "
            "forced_ending "
            "(several judgements make a mean), or ServerEngine for the policy's own judging."
        )
    for name in ("filter_fn", "stop_fn"):
        if getattr(sampling, name) is not None:
            raise ConfigError(f"{name} is a Python function, which no server can run.")
