"""The examples of the ancestor's README that leave something out (`...`), filled in; and the first
one with a judge that can be read. The first and the second as they stand: test_readme.py.
"""

import pytest
import torch
from torch import Tensor
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm import (
    ExternalRewardDPOConfig,
    LocalEngine,
    OptimConfig,
    RewardConfig,
    Run,
    SamplingConfig,
    SelfPlayConfig,
    SelfRewardDPOConfig,
    SelfRewardingTrainer,
    SFTConfig,
    create_mock_dataset,
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """The examples write to ./checkpoints."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def transformer_of(dim: int, heads: int = 2, max_seq_len: int = 1024) -> TransformerWrapper:
    return TransformerWrapper(
        num_tokens=256,
        max_seq_len=max_seq_len,
        attn_layers=Decoder(dim=dim, depth=1, heads=heads),
    )


def decode_tokens(tokens: Tensor) -> str:
    decode_token = lambda token: str(chr(max(32, token)))  # noqa: E731
    return "".join(list(map(decode_token, tokens)))


def encode_str(seq_str: str) -> Tensor:
    return Tensor(list(map(ord, seq_str)))


def test_first_example_runs_to_its_end_with_a_parse_reward_that_gives_numbers():
    transformer = transformer_of(dim=64)
    sft_dataset = create_mock_dataset(100, lambda: (torch.randint(0, 256, (256,)), torch.tensor(1)))
    prompt_dataset = create_mock_dataset(100, lambda: "mock prompt")

    trainer = SelfRewardingTrainer(
        transformer,
        finetune_configs=dict(
            train_sft_dataset=sft_dataset,
            self_reward_prompt_dataset=prompt_dataset,
            dpo_num_train_steps=2,  # the example's 1000, and its 3,964 and 6,942 pairs
            num_generated_preference_pairs=(6, 5),
            self_reward_config=dict(
                prompts_per_block=8,
                generation=SamplingConfig(max_new_tokens=16),  # the default's 256
                judging=SamplingConfig(max_new_tokens=16),
            ),
        ),
        self_reward_prompt_config=RewardConfig(
            prompt_template="Rate {{ response }} as an answer to {{ prompt }}: ",
            parse_reward=lambda text: sum(map(ord, text)) % 6,
        ),
        tokenizer_decode=decode_tokens,
        tokenizer_encode=encode_str,
        accelerate_kwargs=dict(cpu=True),
    )
    run = trainer(overwrite_checkpoints=True)

    assert [run.is_done(stage) for stage in run.stages] == [True, True, True]
    assert [len(run.pairs(stage)) for stage in run.stages] == [0, 6, 5]
    first, second = run.prompts("self_reward"), run.prompts("self_reward-2")
    assert not {p.row for p in first} & {p.row for p in second}  # goes on where the first stopped


def test_third_example_reads_a_reward_prompt_of_ones_own():
    judge = ScriptedEngine("I think: Rating: 7")
    trainer = SelfRewardingTrainer(
        transformer_of(dim=32),
        finetune_configs=[
            SelfRewardDPOConfig(
                prompt_dataset=["mock prompt"],
                num_sampled_reward_responses=1,
                num_train_steps=1,
                generation=SamplingConfig(max_new_tokens=4),
            )
        ],
        tokenizer_decode=decode_tokens,
        tokenizer_encode=encode_str,
        engine=judge,
        self_reward_prompt_config=RewardConfig(
            prompt_template="""
            Pretty please rate the following user prompt and response
            User: {{ prompt }}
            Response: {{ response }}

            Format your score as follows:
            Rating: <rating as integer from 0 - 10>
            """,
            reward_regex_template="""
            Rating: {{ reward }}
            """,
        ),
    )
    with pytest.raises(Exception, match="no preference pair") as error:  # every score is 7
        trainer()
    assert "tie" in str(error.value)
    asked = [text for text in judge.prompts if "Pretty please" in text]
    assert len(asked) == 2 + 4  # the rehearsal's and the run's
    begin = "Pretty please rate the following user prompt and response User: mock prompt Response: "
    assert asked[0].startswith(begin)  # this decoder shows line breaks as spaces
    scores = [j.score for j in Run.open("./checkpoints").judgements("self_reward")]
    assert scores == [7.0] * 4


class ScriptedEngine(LocalEngine):
    """Samples as the local engine does, but answers every judge prompt with one text."""

    def __init__(self, verdict: str) -> None:
        super().__init__()
        self.verdict, self.local, self.prompts = verdict, LocalEngine(), []

    def generate(self, model, requests, decoding):
        from self_rewarding_lm.generation.engine import Completion

        texts = [decode_tokens(torch.tensor(r.ids)) for r in requests]
        self.prompts += texts
        if "Pretty please" not in texts[0]:
            yield from self.local.generate(model, requests, decoding)
            return
        for index in range(len(requests)):
            yield index, Completion(tuple(map(ord, self.verdict)), None)


def test_fourth_example_interleaves_six_stages_and_leaves_six_checkpoints():
    model = transformer_of(dim=32, max_seq_len=256)
    rows = create_mock_dataset(6, lambda: (torch.randint(0, 256, (24,)), torch.tensor(8)))
    prompts = [f"mock prompt {i}" for i in range(12)]
    short = dict(num_train_steps=2, optim=OptimConfig(batch_size=4))
    sampled = dict(
        prompt_dataset=prompts,
        num_generated_preference_pairs=3,
        generation=SamplingConfig(max_new_tokens=8),
        prompts_per_block=4,
        **short,
    )
    self_reward = dict(judging=SamplingConfig(max_new_tokens=8), **sampled)

    trainer = SelfRewardingTrainer(
        model,
        finetune_configs=[
            SFTConfig(train_dataset=rows, **short),
            SelfPlayConfig(train_dataset=rows, **short),
            ExternalRewardDPOConfig(reward_model=lambda ids: ids.float().mean(dim=-1), **sampled),
            SelfRewardDPOConfig(**self_reward),
            SelfPlayConfig(train_dataset=rows, **short),
            SelfRewardDPOConfig(**self_reward),
        ],
        tokenizer_decode=decode_tokens,
        tokenizer_encode=encode_str,
        self_reward_prompt_config=RewardConfig(
            prompt_template="Rate {{ response }} as an answer to {{ prompt }}: ",
            parse_reward=lambda text: sum(map(ord, text)) % 6,
        ),
    )

    run = trainer()

    assert run.stages == [
        "sft",
        "spin",
        "external_reward",
        "self_reward",
        "spin-2",
        "self_reward-2",
    ]
    weights = [run.weights(stage).read_bytes() for stage in run.stages]
    assert len(set(weights)) == 6
