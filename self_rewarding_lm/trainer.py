"""The trainer: it runs stages on a model one after the other, and goes on where it was stopped.

It asks no stage what kind it is. In the order of this file: the trainer (set up in `__init__`, run
by `__call__`), and `SPINTrainer`, which has one stage of self-play.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from self_rewarding_lm.config import (
    DEFAULT_REWARD_CONFIG,
    FinetuneConfig,
    FromStage,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
)
from self_rewarding_lm.context import Context, wrong_names
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.tokenizers import Tokenizer, tokenizer_of
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, StoreError, said, typed
from self_rewarding_lm.generation.engine import Engine
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.server.engine import ServerEngine
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.inference import products_unused_by
from self_rewarding_lm.models.interface import TokenModel, device_of
from self_rewarding_lm.models.loading import (
    Loading,
    check_placement,
    check_trainable,
    end_ids_of,
    is_placed,
    open_model,
)
from self_rewarding_lm.models.merging import MergedAdapter, check_merge
from self_rewarding_lm.models.policy import Policy
from self_rewarding_lm.models.ways import generation_way, training_way
from self_rewarding_lm.recipes.paper import paper_config_of
from self_rewarding_lm.report.card import with_card
from self_rewarding_lm.report.live import show_stage
from self_rewarding_lm.report.page import report_at_end
from self_rewarding_lm.report.verdict import verdict
from self_rewarding_lm.runs.callbacks import Callbacks
from self_rewarding_lm.runs.fingerprint import fingerprint_of
from self_rewarding_lm.runs.lock import alone
from self_rewarding_lm.runs.resume import begin_run, check_begun, save_initial
from self_rewarding_lm.runs.run import INITIAL, Run
from self_rewarding_lm.runs.stage_folder import StageDir, ends_told
from self_rewarding_lm.runs.weights import save_folder, write_weights
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.scores import rounding_each_step
from self_rewarding_lm.stages.base import stage_names
from self_rewarding_lm.stages.rehearsal import rehearse_stages
from self_rewarding_lm.stages.spin import SelfPlayConfig
from self_rewarding_lm.text import amount

logger = logging.getLogger(__name__)


OVERWRITE_VARIABLE = "SELF_REWARDING_LM_OVERWRITE"


MERGED = "merged"  # the folder of a merged adapter, within the run


class SelfRewardingTrainer:
    """Runs stages on a model, one after the other, each with its records and weights on disk.

    model: ids (b, n) -> logits (b, n, v), or an object with `.logits`; trained in place. A Hugging
    Face causal LM is taken as it is, or by its folder, hub name or .gguf file; those are loaded in
    `torch_dtype` (default float32), with `device_map`, or with `load_in_4bit` (bitsandbytes).
    peft_config: train and save a LoRA adapter in place of all weights; with `merge_adapter` the
    merged model is written to <checkpoints_folder>/merged after the last stage. finetune_configs: a
    list of stages, or a dict for create_default_paper_config(**dict). tokenizer: a Hugging Face
    tokenizer, or an object with encode and decode. tokenizer_encode: in its place, str -> 1-D
    tensor of any number dtype, with tokenizer_decode, tensor -> str. Stages that see only ids need
    neither. chat_template: a name (plain, chatml, llama-3, gemma, zephyr), jinja text, or "raw";
    default the tokenizer's own. self_reward_prompt_config: the judge's prompt, or several by name.
    eos_id: the end token; default the tokenizer's eos_token_id. pad_id: accepted but not needed,
    since masks come from lengths. seed: of sampling, of the order of rows and of dropout.
    checkpoints_folder: the run directory. keep_stages: how many finished stages keep their weights
    on disk: the last ones, and those that a later stage uses; default all. accelerate_kwargs: for
    accelerate.Accelerator. engine: default LocalEngine(); ServerEngine(...) generates with an
    inference server. callbacks: objects whose methods are called at pairs, steps and stages, see
    Callback. report_to: trackers that get all metrics, by Accelerate's names ("wandb",
    "tensorboard", ...); those that write files write to <checkpoints_folder>/trackers. quiet: no
    progress, warnings only (as SELF_REWARDING_LM_QUIET=1). report: write report.html into the run
    when it is done.

    Raises an error for everything that is known to be wrong before the first stage: ConfigError,
    DataError, TokenizerError, AdapterError, JudgeError, ArgumentTypeError.
    """

    @typed
    def __init__(
        self,
        model: nn.Module | str | Path,
        *,
        finetune_configs: Sequence[FinetuneConfig] | dict[str, Any],
        tokenizer: Tokenizer | None = None,
        tokenizer_encode: Callable[[str], Any] | None = None,
        tokenizer_decode: Callable[[Tensor], str] | None = None,
        self_reward_prompt_config: RewardConfig | Mapping[str, RewardConfig] | None = None,
        chat_template: str | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        load_in_4bit: bool = False,
        peft_config: Any = None,
        merge_adapter: bool = False,
        eos_id: int | None = None,
        pad_id: int | None = None,
        seed: int = 0,
        checkpoints_folder: str | Path = "./checkpoints",
        accelerate_kwargs: Mapping[str, Any] = {},
        keep_stages: int | None = None,
        engine: Engine | None = None,
        callbacks: Sequence[Any] = (),
        report_to: str | Sequence[Any] = (),
        quiet: bool = False,
        report: bool = True,
    ) -> None:
        # 1. the stages and their names
        if isinstance(finetune_configs, dict):
            finetune_configs = paper_config_of(finetune_configs)
        self.stages = list(finetune_configs)
        for stage in self.stages:
            if not isinstance(stage, FinetuneConfig):
                raise ConfigError(
                    "finetune_configs must be a list of stages (SFTConfig(...), ...); it holds a "
                    f"{type(stage).__name__}: {stage!r:.100}"
                )
        if not self.stages:
            raise ConfigError("finetune_configs is empty; give at least one stage.")
        if keep_stages is not None and keep_stages < 1:
            raise ConfigError(f"keep_stages must be at least 1, or None (all); got {keep_stages}.")
        self.names = stage_names(self.stages)
        # 2. the run's folder, processes and settings
        self.folder = Path(checkpoints_folder)
        settings = _with_trackers(accelerate_kwargs, report_to, self.folder / "trackers")
        self.runtime = Runtime(settings, quiet=quiet)
        self.seed, self.keep_stages = seed, keep_stages
        self.engine = engine or LocalEngine()
        self.callbacks, self.report = Callbacks(callbacks), report
        self.rewards = _rewards_by_name(self_reward_prompt_config)
        # 3. the model, on its device, and the module that is trained
        given_tokenizer = tokenizer_of(tokenizer, tokenizer_encode, tokenizer_decode)
        check_placement(model, device_map, self.runtime.world)
        loading = Loading(torch_dtype, device_map, load_in_4bit, peft_config, merge_adapter, seed)
        self.model, models_tokenizer = open_model(model, loading)
        check_trainable(self.model)
        self.merge_adapter = merge_adapter
        has_device = is_placed(self.model)
        if not has_device:
            self.model.to(self.runtime.device)
        if merge_adapter:
            check_merge(self.model)
        self.token_model: TokenModel = adapt(self.model)
        self.policy = self.runtime.prepare(Policy(self.token_model), place=not has_device)
        # 4. the tokenizer, its chat template and end tokens
        self.tokens = Tokens(
            given_tokenizer or models_tokenizer,
            eos_id=eos_id,
            vocab=self.token_model.vocab,
            chat_template=chat_template,
            end_ids=end_ids_of(self.model) if eos_id is None else (),
        )
        self._check_pad_id(pad_id)
        # 5. a context for each stage, in which the stage and the callbacks check what they can
        self._run: Run | None = None  # begun by __call__
        self.contexts = [self._context(place) for place in range(len(self.stages))]
        for stage, ctx in zip(self.stages, self.contexts, strict=True):
            stage.check(ctx)
            for check in self.callbacks.of("check"):
                check(ctx)

    @property
    def unwrapped_model(self) -> nn.Module:
        """The user's module, without any wrapper for training."""
        return self.model

    @typed
    def __call__(self, *, overwrite_checkpoints: bool | None = None, rehearse: bool = True) -> Run:
        """Run the stages that are not done; the model is trained in place.

        Goes on where an earlier call was stopped, from the records and the training state on disk.
        overwrite_checkpoints: start anew, and delete the earlier run's files first; None looks at
        the environment variable SELF_REWARDING_LM_OVERWRITE. rehearse: try all stages in short
        before the first begins. Raises RunMismatchError if a stage that was begun has other
        settings now, StoreError if another run is in the folder, Interrupted (a KeyboardInterrupt)
        if a signal stopped it.
        """
        if overwrite_checkpoints is None:
            overwrite_checkpoints = os.environ.get(OVERWRITE_VARIABLE, "") not in ("", "0")
        runtime, engine = self.runtime, self.engine
        keeping = engine.kept() if isinstance(engine, ServerEngine) else nullcontext()
        with alone(self.folder, runtime), runtime.stopping.listening(), runtime.at_work(), keeping:
            return self._run_all(overwrite_checkpoints, rehearse)

    def _run_all(self, overwrite_checkpoints: bool, rehearse: bool) -> Run:
        for line in self.ways():
            logger.info(line)
        if (words := self.products_unused()) is not None:
            logger.info(words)
        # 1. try all stages in short, then begin the run or open it again
        folders = [f"{number:02d}-{name}" for number, name in enumerate(self.names, 1)]
        settings = [self._settings(stage) for stage in self.stages]
        if not overwrite_checkpoints:
            check_begun(self.folder, runtime=self.runtime, stages=folders, settings=settings)
        if rehearse:
            rehearse_stages(self, [] if overwrite_checkpoints else folders)
        run = begin_run(
            self.folder,
            runtime=self.runtime,
            stages=folders,
            settings=settings,
            model=self.model,
            seed=self.seed,
            overwrite=overwrite_checkpoints,
        )
        if self.tokens.follow(run.format, run.begun):
            for rows in (rows for ctx in self.contexts for rows in ctx.rows.values()):
                rows.forget_prompts()
        if any(INITIAL in stage.weights_used() for stage in self.stages):
            save_initial(run, self.token_model, self.model, self.runtime)
        for rows in (rows for ctx in self.contexts for rows in ctx.rows.values()):
            rows.follow(run.format)
        self._run = run
        # 2. load the weights of the last stage that is done
        total = len(self.stages)
        first = next((place for place in range(total) if not run.is_done(place)), total)
        if first > 0:
            of_all = f"{first} of {amount(total, 'stage')}"
            logger.info("%s done already in %s", of_all, self.folder)
            self.token_model.load(run.weights(first - 1))
            self._drop_old_weights(run, first - 1)
        # 3. run the stages that are not done
        for place in range(first, total):
            self._run_stage(run, place)
            self._drop_old_weights(run, place)
        if first < total and self.runtime.is_main and (said := verdict(run)):
            logger.info("%s", " ".join(said))
        # 4. write the report and the merged adapter
        if self.report and self.runtime.is_main:
            report_at_end(run)
        if self.merge_adapter and self.runtime.is_main:
            beside = with_card(run, self.names[-1], self.tokens.save)
            save_folder(MergedAdapter(self.model), self.folder / MERGED, beside)
        self.runtime.barrier()
        self.runtime.end_trackers()
        return run

    def ways(self) -> list[str]:
        """How this model is decoded and trained, and why no faster way is used."""
        precision = self.runtime.accelerator.mixed_precision
        mixed = "" if precision == "no" else f", mixed precision {precision}"
        generating = f"by {type(self.engine).__name__}"
        if isinstance(self.engine, LocalEngine):
            generating = f"{generation_way(self.token_model)}{mixed}"
        training = f"{training_way(self.token_model)}{mixed}"
        return [f"generation: {generating}", f"training: {training}"]

    def products_unused(self) -> str | None:
        """A sentence if this CPU has bfloat16 products with which the run would be faster."""
        mixed = self.runtime.accelerator.mixed_precision != "no"
        return products_unused_by(self.model, device_of(self.model), mixed=mixed)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the model's weights to a safetensors file; a relative path is within the run."""
        target = self.folder / path
        if self.runtime.from_main(target.exists()) and not overwrite:
            raise StoreError(f"{target} exists; pass overwrite=True to replace it.")
        if self.runtime.is_main:
            write_weights(self.model, target)
        self.runtime.barrier()

    def _run_stage(self, run: Run, place: int) -> None:
        # 1. the context: this run, and where earlier stages stopped in the prompts
        stage, name = self.stages[place], self.names[place]
        first_prompt = self._first_prompt(run, place)
        ctx = replace(self.contexts[place], run=run, first_prompt=first_prompt)
        for rows in ctx.rows.values():
            rows.forget_stages()
        # 2. the weights it begins with, and its folder
        if stage.init_from != "previous":
            ctx.load(stage.init_from)
        beside = with_card(run, name, self.tokens.save)
        steps_before = sum(run.summary(earlier).get("steps", 0) for earlier in range(place))
        out = StageDir(run.stage(place).path, self.runtime, beside, steps_before=steps_before)
        out.begin(self._settings(stage))
        out.tell("ways", words=self.ways())
        # 3. the stage itself
        logger.info("stage %d of %d: %s", place + 1, len(self.stages), name)
        rules = rounding_each_step() if ctx.format == 1 else nullcontext()
        with ends_told(out.tell), rules:
            stage.run(ctx, out)
            stage.see_result(ctx, out)
        # 4. its weights, its end, and the callbacks
        out.save_weights(self.token_model)
        if self.callbacks.of("on_stage_trained"):
            with self.runtime.working_together():
                ctx.told("on_stage_trained", out)
        out.finish()
        if self.runtime.is_main:
            show_stage(run, name, self.runtime, steps_before + out.summary.get("steps", 0))
        with self.runtime.working_together():
            for on_stage_end in self.callbacks.of("on_stage_end") if self.runtime.is_main else ():
                on_stage_end(run, name, self.model)

    def _drop_old_weights(self, run: Run, place: int) -> None:
        """Delete weights beyond the last `keep_stages`, unless a stage after `place` uses them."""
        later_stages = self.stages[place + 1 :]
        needed: set[str] = set().union(*(stage.weights_used() for stage in later_stages))
        for old in range(place + 1 - (self.keep_stages or len(self.stages))):
            if self.names[old] not in needed:
                StageDir(run.stage(old).path, self.runtime).drop_weights("model")

    def _context(self, place: int) -> Context:
        """What the stage at `place` may reach, before the run has begun; its datasets are opened.

        Raises ConfigError if the stage names weights or records that no earlier stage makes.
        """
        stage, name, earlier = self.stages[place], self.names[place], self.names[:place]
        for error in wrong_names(stage, name, earlier):
            raise error
        self.tokens.compare_template(name, Path(stage.init_from))

        def resolve(source: FromStage) -> Sequence[Any]:
            assert self._run is not None
            return self._run.training_data(source.stage)

        return Context(
            stage=name,
            seed=self.seed,
            model=self.token_model,
            policy=self.policy,
            engine=self.engine,
            tokens=self.tokens,
            runtime=self.runtime,
            rewards=self.rewards,
            adapt=self._adapt_on_device,
            rows={field: Rows(data, field, resolve) for field, data in stage.datasets().items()},
            earlier=earlier,
            callbacks=self.callbacks,
        )

    def _adapt_on_device(self, module: nn.Module) -> TokenModel:
        return adapt(module.to(self.runtime.device))

    def _first_prompt(self, run: Run, place: int) -> int:
        """Where the stage at `place` begins in its prompts, counted over all passes.

        That is where the last stage before it that has the same prompts stopped.
        """
        stage = self.stages[place]
        prompts = stage.datasets().get("prompt_dataset")
        if prompts is None or getattr(stage, "reuse_prompts", False):
            return 0
        for earlier in reversed(range(place)):
            if _is_same_dataset(self.stages[earlier].datasets().get("prompt_dataset"), prompts):
                rows = len(self.contexts[earlier].rows["prompt_dataset"])
                skips = getattr(self.stages[earlier], "on_bad_row", "raise") == "skip"
                return run.next_prompt(earlier, rows, skips=skips)
        return 0

    def _settings(self, stage: FinetuneConfig) -> dict[str, Any]:
        """What config.json holds of a stage, to compare when the run goes on."""
        prompts = {name: fingerprint_of(self.rewards.get(name)) for name in stage.reward_names()}
        return {
            "stage": type(stage).__name__,
            "settings": fingerprint_of(stage),
            "reward_prompts": prompts,
            "seed": self.seed,
            "eos_id": self.tokens.eos_id,
            "chat_template": (self.tokens.template or "own") if self.tokens.renders else None,
        }

    def _check_pad_id(self, pad_id: int | None) -> None:
        if pad_id is not None and not -1 <= pad_id < self.token_model.vocab:
            raise ConfigError(
                f"pad_id must be a token of the model, 0 to {self.token_model.vocab - 1} (or be "
                f"left out, it is not needed); got {pad_id}."
            )


def _rewards_by_name(
    config: RewardConfig | Mapping[str, RewardConfig] | None,
) -> dict[str, RewardConfig]:
    if config is None:
        return {"default": DEFAULT_REWARD_CONFIG}
    return {"default": config} if isinstance(config, RewardConfig) else dict(config)


def _with_trackers(
    accelerate_kwargs: Mapping[str, Any], report_to: str | Sequence[Any], folder: Path
) -> Mapping[str, Any]:
    """The arguments of Accelerate with trackers, which write their files into a folder."""
    trackers = [report_to] if isinstance(report_to, str) else list(report_to)
    if not trackers:
        return accelerate_kwargs
    if "log_with" in accelerate_kwargs:
        raise ConfigError(
            f"report_to and the log_with of {said('accelerate_kwargs', '`accelerate`')} both name "
            "trackers; give one of them."
        )
    return {"project_dir": str(folder), **accelerate_kwargs, "log_with": trackers}


def _is_same_dataset(first: Any, second: Any) -> bool:
    return first is second or (isinstance(first, str | Path) and str(first) == str(second))


class SPINTrainer(SelfRewardingTrainer):
    """A trainer with a single SPIN stage (arXiv:2401.01335).

    train_sft_dataset: rows with a prompt and a completion, as for SFT. spin_lambda, or
    spin_kwargs=dict(λ=...): lambda of Eq. 4.7. checkpoint_every: steps between copies of the
    weights. checkpoint_folder: the run directory. The other arguments are those of SelfPlayConfig,
    OptimConfig and SelfRewardingTrainer.
    """

    @typed
    def __init__(
        self,
        model: nn.Module,
        *,
        train_sft_dataset: Any,
        valid_sft_dataset: Any = None,
        max_seq_len: int | None = None,
        spin_lambda: float = 0.1,
        spin_kwargs: Mapping[str, float] = {},
        iterations: int = 1,
        mix_previous: bool = False,
        epochs: int | None = None,
        num_train_steps: int | None = None,
        batch_size: int = 16,
        learning_rate: float | None = None,
        dropout: float = 0.0,
        generation: SamplingConfig | None = None,
        checkpoint_every: int | None = None,
        tokenizer: Tokenizer | None = None,
        tokenizer_encode: Callable[[str], Any] | None = None,
        tokenizer_decode: Callable[[Tensor], str] | None = None,
        eos_id: int | None = None,
        seed: int = 0,
        checkpoint_folder: str | Path = "./spin-checkpoints",
        accelerate_kwargs: Mapping[str, Any] = {},
        quiet: bool = False,
    ) -> None:
        unknown = set(spin_kwargs) - {"λ", "spin_lambda"}
        if unknown:
            raise ConfigError(
                f"spin_kwargs knows 'λ' (or 'spin_lambda'); got {', '.join(sorted(unknown))}."
            )
        stage = SelfPlayConfig(
            train_dataset=train_sft_dataset,
            valid_dataset=valid_sft_dataset,
            max_seq_len=max_seq_len,
            spin_lambda=next(iter(spin_kwargs.values()), spin_lambda),
            iterations=iterations,
            mix_previous=mix_previous,
            num_train_steps=num_train_steps,
            dropout=dropout,
            generation=generation or SamplingConfig(),
            optim=OptimConfig(
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                checkpoint_every=checkpoint_every,
            ),
        )
        super().__init__(
            model,
            finetune_configs=[stage],
            tokenizer=tokenizer,
            tokenizer_encode=tokenizer_encode,
            tokenizer_decode=tokenizer_decode,
            eos_id=eos_id,
            seed=seed,
            checkpoints_folder=checkpoint_folder,
            accelerate_kwargs=accelerate_kwargs,
            quiet=quiet,
        )
