"""Talking to a model: what it is asked stands after what was said before."""

from self_rewarding_lm.config import SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.chat import Message
from self_rewarding_lm.errors import ConfigError, DataError, give_tokenizer
from self_rewarding_lm.records import Candidate, Prompt


class Talk:
    """A conversation with a context's model, which answers by `sampling`.

    system: what stands before all that is asked, as the chat template's system message. Without a
    chat template each question is a text of its own, and nothing is kept (`keeps`).
    """

    def __init__(self, ctx: Context, sampling: SamplingConfig, system: str | None = None) -> None:
        if ctx.tokens.tokenizer is None:
            raise ConfigError(
                f"a model is asked in texts, and has no tokenizer. {give_tokenizer()}"
            )
        self.keeps = ctx.tokens.renders
        if system is not None and not self.keeps:
            raise ConfigError("a system message needs a chat template, and the texts are as given.")
        self.ctx, self.sampling = ctx, sampling
        self.start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.asked = 0
        self.forget()

    def forget(self) -> None:
        """Begin the conversation anew."""
        self.said = list(self.start)

    def answer(self, question: str) -> Candidate:
        """The model's answer, which is kept with its question.

        Raises DataError if the conversation leaves no room for one; the question is not kept then.
        """
        said = [*self.said, {"role": "user", "content": question}]
        asked = self.ctx.tokens.prompt(said if self.keeps else question, "the conversation")
        limit = self.ctx.limit(None)
        if limit is not None and len(asked.ids) >= limit:
            raise DataError(
                f"the conversation has {len(asked.ids)} tokens, which leaves no room for an answer "
                f"in the {limit} that the model takes."
            )
        prompt = Prompt(f"{self.ctx.stage}/{self.asked}/0", self.asked, asked.ids, asked.text)
        [answer] = self.ctx.sample([prompt], self.sampling, 1)
        self.asked += 1
        if self.keeps:
            self.said = [*said, {"role": "assistant", "content": answer.text or ""}]
        return answer
