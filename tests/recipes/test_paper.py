"""The paper's stages: their order, their numbers, what may be changed; positive-only rounds."""

import inspect

import pytest

from self_rewarding_lm.config import FromStage, OptimConfig, SamplingConfig, SelfInstruct
from self_rewarding_lm.describe import REQUIRED, settings_of
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.recipes.paper import create_default_paper_config, paper_recipe
from self_rewarding_lm.stages.eft import BuildEFTConfig
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.self_reward_sft import SelfRewardSFTConfig
from self_rewarding_lm.stages.sft import SFTConfig

IFT = [{"prompt": "say 1", "completion": "1"}]
RANKED = [{"prompt": "say 1", "replies": ["1", "2"]}]
PROMPTS = ["tell 1", "tell 2"]


def recipe(**changes):
    return paper_recipe(**{"ift": IFT, "ranked": RANKED, "prompts": PROMPTS, **changes})


def test_the_stages_are_baseline_eft_m1_m2_m3():
    stages = recipe()
    assert [stage.name for stage in stages] == ["sft_baseline", "eft", "m1", "m2", "m3"]
    assert [type(stage) for stage in stages] == [
        SFTConfig,
        BuildEFTConfig,
        SFTConfig,
        SelfRewardDPOConfig,
        SelfRewardDPOConfig,
    ]


def test_m1_starts_from_m0_again_with_the_judgements_of_the_baseline():
    baseline, eft, m1, m2, m3 = recipe()
    assert [s.init_from for s in (baseline, eft, m1, m2, m3)] == [
        "previous",
        "previous",
        "initial",
        "previous",
        "previous",
    ]
    assert baseline.train_dataset is IFT
    assert eft.ranked_dataset is RANKED
    assert m1.train_dataset == [IFT, FromStage("eft")]


def test_m1_reads_every_part_of_instruction_rows_that_are_several_datasets(tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    m1 = recipe(ift=[one, other])[2]
    assert m1.train_dataset == [one, other, FromStage("eft")]


def test_the_numbers_are_those_of_the_paper():
    """arXiv:2401.10020, section 3.1.3."""
    baseline, _, m1, m2, m3 = recipe()
    for stage in (baseline, m1):
        assert (stage.optim.learning_rate, stage.optim.final_learning_rate) == (5.5e-6, 1.1e-6)
        assert (stage.optim.schedule, stage.optim.batch_size, stage.dropout) == ("cosine", 16, 0.1)
    for stage, pairs in ((m2, 3964), (m3, 6942)):
        assert (stage.optim.learning_rate, stage.optim.final_learning_rate) == (1e-6, 1e-7)
        assert (stage.optim.schedule, stage.optim.batch_size, stage.dropout) == ("cosine", 16, 0.1)
        assert (stage.dpo_beta, stage.num_candidate_responses) == (0.1, 4)
        assert stage.num_sampled_reward_responses == 3
        assert stage.num_generated_preference_pairs == pairs
        for sampling in (stage.generation, stage.judging):
            assert (sampling.temperature, sampling.top_p) == (0.7, 0.9)
        assert stage.optim.eval_every == 200
        assert stage.early_stopper_eval_module is None


def test_the_papers_numbers_of_pairs_give_way_to_few_prompts_and_given_numbers_do_not():
    for stages in (recipe(), recipe(positive_only=True)):
        m2, m3 = stages[-2:]
        few = 3963 // m2.most_of_prompt
        assert m2.pairs_wanted(few) is None and m2.pairs_wanted(few + 1) == 3964
        assert m3.pairs_wanted(4000 // m3.most_of_prompt) is None
    given = [
        recipe(num_generated_preference_pairs=70)[-1],
        recipe(num_generated_preference_pairs=(50, 70))[-1],
        recipe(self_reward={"num_generated_preference_pairs": 70})[-1],
    ]
    assert [stage.pairs_wanted(2) for stage in given] == [70] * 3
    data = dict(train_sft_dataset=IFT, self_reward_prompt_dataset=PROMPTS)
    default = create_default_paper_config(**data)[-1]
    assert default.pairs_wanted(2) is None and default.pairs_wanted(6942) == 6942
    (own,) = create_default_paper_config(**data, num_generated_preference_pairs=(9,))[1:]
    assert own.pairs_wanted(2) == 9


def test_every_number_of_the_recipe_reaches_its_stages():
    def stop(model):
        return 0.0

    baseline, eft, m1, m2, m3 = recipe(
        num_generated_preference_pairs=(5, 7),
        num_candidate_responses=6,
        num_sampled_reward_responses=2,
        temperature=1.0,
        top_p=None,
        max_new_tokens=9,
        sft_learning_rates=(1e-3, 1e-4),
        dpo_learning_rates=(1e-5, 1e-6),
        sft_epochs=4,
        dpo_epochs=2,
        batch_size=8,
        dropout=0.0,
        dpo_beta=0.3,
        early_stopper_eval_module=stop,
        eval_every=50,
        valid_ift=IFT,
    )
    for stage in (baseline, m1):
        optim = stage.optim
        assert (optim.learning_rate, optim.final_learning_rate, optim.epochs) == (1e-3, 1e-4, 4)
        assert stage.valid_dataset is IFT
    for stage in (m2, m3):
        optim = stage.optim
        assert (optim.learning_rate, optim.final_learning_rate, optim.epochs) == (1e-5, 1e-6, 2)
        assert (stage.dpo_beta, stage.num_candidate_responses) == (0.3, 6)
        assert stage.num_sampled_reward_responses == 2
        assert stage.early_stopper_eval_module is stop
    assert [m.num_generated_preference_pairs for m in (m2, m3)] == [5, 7]
    for stage in (baseline, m1, m2, m3):
        assert (stage.dropout, stage.optim.batch_size, stage.optim.eval_every) == (0.0, 8, 50)
    for sampling in (eft.judging, m2.generation, m2.judging, m3.generation, m3.judging):
        assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (1.0, None, 9)


def test_further_rounds_repeat_the_last_number_of_pairs():
    counts = [s.num_generated_preference_pairs for s in recipe(iterations=4)[3:]]
    assert counts == [3964, 6942, 6942, 6942]
    assert [s.name for s in recipe(iterations=4)[3:]] == ["m2", "m3", "m4", "m5"]


def test_without_iterations_the_recipe_ends_with_m1():
    assert [stage.name for stage in recipe(iterations=0)] == ["sft_baseline", "eft", "m1"]


def test_without_ranked_replies_m1_is_trained_on_the_instruction_rows_alone():
    stages = recipe(ranked=None)
    assert [stage.name for stage in stages] == ["m1", "m2", "m3"]
    assert stages[0].train_dataset is IFT
    assert stages[0].init_from == "previous"


def test_a_stage_s_own_settings_stand_above_the_recipe_and_leave_the_others():
    baseline, eft, m1, m2, m3 = recipe(
        sft={"max_seq_len": 64, "optim": {"schedule": "linear"}},
        eft={"method": "ranks"},
        self_reward={"nll_weight": 0.2, "judging": SamplingConfig(temperature=0.0)},
    )
    for stage in (baseline, m1):
        assert stage.max_seq_len == 64
        assert (stage.optim.schedule, stage.optim.learning_rate) == ("linear", 5.5e-6)
    assert eft.method == "ranks"
    for stage in (m2, m3):
        assert stage.nll_weight == 0.2
        assert (stage.judging.temperature, stage.judging.top_p) == (0.0, 0.9)
        assert stage.generation.temperature == 0.7


def test_settings_within_settings_may_be_a_config_that_says_only_what_changes():
    m1 = recipe(batch_size=8, sft={"optim": OptimConfig(epochs=1)})[2]
    assert (m1.optim.epochs, m1.optim.batch_size, m1.optim.learning_rate) == (1, 8, 5.5e-6)


def test_steps_in_place_of_epochs():
    m1 = recipe(sft={"num_train_steps": 7})[2]
    assert m1.planned_steps(1000) == 7


def test_prompts_may_be_one_dataset_a_round_or_written_by_a_model():
    first, second = ["a"], ["b"]
    stages = recipe(prompts=(first, second))
    assert (stages[3].prompt_dataset, stages[4].prompt_dataset) == (first, second)
    written = SelfInstruct(seed_dataset=PROMPTS, num_prompts=10)
    assert all(stage.prompt_dataset is written for stage in recipe(prompts=written)[3:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": (["a"],)}, "one dataset a round: the tuple has 1 for 2 rounds"),
        ({"iterations": -1}, "iterations must be 0 or more; got -1"),
        ({"num_generated_preference_pairs": ()}, "is empty"),
        ({"sft": {"epochs": 1}}, "'epochs' is not a setting"),
        ({"sft": {"optim": {"batchsize": 1}}}, "did you mean 'batch_size'"),
        ({"self_reward": {"beta": 1}}, "'beta' is not a setting"),
        ({"dpo_beta": 0.0}, "dpo_beta"),
    ],
)
def test_wrong_settings_are_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        recipe(**changes)


def test_positive_only_rounds_train_m0_anew_on_seed_data_and_top_responses():
    stages = recipe(positive_only=True)
    assert [type(stage) for stage in stages[3:]] == [SelfRewardSFTConfig] * 2
    for stage in stages[3:]:
        assert stage.train_dataset == [IFT, FromStage("eft")]
        assert (stage.init_from, stage.fit_from) == ("previous", "initial")
        assert (stage.optim.learning_rate, stage.optim.final_learning_rate) == (5.5e-6, 1.1e-6)
        assert "initial" in stage.weights_used()


def test_positive_only_without_eft_mixes_the_instruction_rows_alone():
    assert recipe(positive_only=True, ranked=None)[1].train_dataset is IFT


def test_every_argument_is_documented():
    undocumented = [s.name for s in settings_of(paper_recipe) if not s.words]
    assert undocumented == []
    required = [s.name for s in settings_of(paper_recipe) if s.default is REQUIRED]
    assert required == ["ift", "prompts"]
    names = list(inspect.signature(paper_recipe).parameters)
    assert [s.name for s in settings_of(paper_recipe)] == names


def test_the_default_config_keeps_its_stages():
    stages = create_default_paper_config(train_sft_dataset=IFT, self_reward_prompt_dataset=PROMPTS)
    assert [type(stage) for stage in stages] == [SFTConfig, *[SelfRewardDPOConfig] * 2]
    assert [stage.name for stage in stages] == [None, None, None]
    assert [s.num_generated_preference_pairs for s in stages[1:]] == [3964, 6942]


def test_the_default_config_and_the_recipe_train_alike():
    """What the one leaves to the stages' defaults is what the other says."""
    plain = create_default_paper_config(train_sft_dataset=IFT, self_reward_prompt_dataset=PROMPTS)
    said = recipe(ranked=None)
    for one, other in zip(plain, said, strict=True):
        rates, epochs = type(one).default_learning_rates, type(one).default_epochs
        completed = one.optim.completed(*rates, epochs)
        assert completed.model_dump() == other.optim.completed(*rates, epochs).model_dump()
        skipped = {"name", "optim", "train_dataset", "prompt_dataset"}
        assert one.model_dump(exclude=skipped) == other.model_dump(exclude=skipped)
