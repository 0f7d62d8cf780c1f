"""The trainer: order of stages, resume, checkpoints, and the callbacks it calls between stages.

It asks no stage what kind it is. `SPINTrainer` is the trainer for self-play alone.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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
from self_rewarding_lm.data.tokenizers import CallableTokenizer, Tokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, StoreError, typed
from self_rewarding_lm.generation.engine import Engine
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.models.loading import (
    Loading,
    check_placement,
    check_trainable,
    end_ids_of,
    is_placed,
    merged,
    open_model,
)
from self_rewarding_lm.models.policy import Policy
from self_rewarding_lm.recipes.paper import paper_config_of
from self_rewarding_lm.report.card import with_card
from self_rewarding_lm.report.page import report_at_end
from self_rewarding_lm.report.terminal import show_stage
from self_rewarding_lm.runs.fingerprint import fingerprint_of
from self_rewarding_lm.runs.lock import alone
from self_rewarding_lm.runs.resume import begin_run, save_initial
from self_rewarding_lm.runs.run import INITIAL, Run
from self_rewarding_lm.runs.stage_folder import StageDir, ends_told
from self_rewarding_lm.runs.weights import save_folder, write_weights
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.stages.base import stage_names
from self_rewarding_lm.stages.rehearsal import rehearse_stages
from self_rewarding_lm.stages.spin import SelfPlayConfig


@runtime_checkable
class Callback(Protocol):
    """Called on the main process."""

    def on_stage_end(self, run: Run, stage: str, model: nn.Module) -> None:
        """The stage's weights are in `model` and on disk."""
        ...


@runtime_checkable
class StageCallback(Protocol):
    """Called on all processes, with what the stage could reach."""

    def check(self, ctx: Context) -> None:
        """Raise where something is wrong that can be known before stage 1; asked of each stage."""
        ...

    def on_stage_trained(self, ctx: Context, out: StageDir) -> None:
        """The stage's weights are in the model and on disk; the stage is not yet done, so that
        metrics and `out.summary` are still its own. Called again where a run stops in it."""
        ...


def tell_trained(callbacks: Iterable[object], ctx: Context, out: StageDir) -> None:
    """Call those that work with a stage's context."""
    for callback in callbacks:
        if isinstance(callback, StageCallback):
            callback.on_stage_trained(ctx, out)


def tell_ended(callbacks: Iterable[object], run: Run, stage: str, model: nn.Module) -> None:
    """Call those that look at a stage that is done; for the main process."""
    for callback in callbacks:
        if isinstance(callback, Callback):
            callback.on_stage_end(run, stage, model)


logger = logging.getLogger(__name__)


OVERWRITE_VARIABLE = "SELF_REWARDING_LM_OVERWRITE"


MERGED = "merged"


class SelfRewardingTrainer:
    """Runs stages on a model, one after the other, each with its records and weights on disk.

    model: ids (b, n) -> logits (b, n, v), or an object with `.logits`; trained in place. A Hugging
    Face causal LM as it is, or by folder, hub name or .gguf file; those are loaded in `torch_dtype`
    (default float32), with `device_map`, or with `load_in_4bit` (bitsandbytes). peft_config: a
    LoRA adapter is trained and saved in place of all weights; with `merge_adapter` the merged
    model is written to <checkpoints_folder>/merged after the last stage.
    finetune_configs: a list of stages, or a dict for create_default_paper_config(**dict).
    tokenizer: of Hugging Face, or an object with encode and decode; or tokenizer_encode, str -> 1-D
    tensor of any number dtype, and tokenizer_decode, tensor -> str. Stages that see only ids need
    none. chat_template: a name (plain, chatml, llama-3, gemma, zephyr), jinja text, or "raw";
    default the tokenizer's own.
    self_reward_prompt_config: the judge's prompt, or several by name.
    eos_id: the end token; default the tokenizer's eos_token_id. pad_id: accepted and not needed,
    masks come from lengths. checkpoints_folder: the run directory. keep_stages: how many of the
    stages that are done keep their weights on disk, the last ones, and those that a later stage
    asks for; default all. accelerate_kwargs: for accelerate.Accelerator. engine: default
    LocalEngine(); ServerEngine(...) generates by an inference server. quiet: no progress, warnings
    only (as SELF_REWARDING_LM_QUIET=1). report: write report.html into the run when it is done.

    Everything that can be known to be wrong before the first stage is raised here: ConfigError,
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
        callbacks: Sequence[Callback | StageCallback] = (),
        quiet: bool = False,
        report: bool = True,
    ) -> None:
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
        self.folder = Path(checkpoints_folder)
        self.runtime = Runtime(accelerate_kwargs, quiet=quiet)
        self.seed, self.keep_stages = seed, keep_stages
        self.engine = engine or LocalEngine()
        self.callbacks, self.report = tuple(callbacks), report
        self.rewards = _rewards(self_reward_prompt_config)
        found = _tokenizer(tokenizer, tokenizer_encode, tokenizer_decode)
        check_placement(model, device_map, self.runtime.world)
        options = Loading(torch_dtype, device_map, load_in_4bit, peft_config, merge_adapter, seed)
        self.model, own = open_model(model, options)
        check_trainable(self.model)
        self.merge_adapter = merge_adapter
        placed = is_placed(self.model)
        if not placed:
            self.model.to(self.runtime.device)
        self.token_model: TokenModel = adapt(self.model)
        self.policy = self.runtime.prepare(Policy(self.token_model), place=not placed)
        self.tokens = Tokens(
            found or own,
            eos_id=eos_id,
            vocab=self.token_model.vocab,
            chat_template=chat_template,
            end_ids=end_ids_of(self.model) if eos_id is None else (),
        )
        self._check_pad(pad_id)

        self._run: Run | None = None
        self.contexts = [self._context(i) for i in range(len(self.stages))]
        for stage, ctx in zip(self.stages, self.contexts, strict=True):
            stage.check(ctx)
            for callback in (c for c in self.callbacks if isinstance(c, StageCallback)):
                callback.check(ctx)

    @property
    def unwrapped_model(self) -> nn.Module:
        """The user's module, without any wrapper for training."""
        return self.model

    @typed
    def __call__(self, *, overwrite_checkpoints: bool | None = None, rehearse: bool = True) -> Run:
        """Run the stages that are not done; the model is trained in place.

        Goes on where an earlier call was stopped, with the records and the training state that
        exist. overwrite_checkpoints: start anew, and delete the earlier run's files
        first; None looks at the environment variable SELF_REWARDING_LM_OVERWRITE. Raises
        RunMismatchError where a started stage has other settings now, StoreError where another run
        is in the folder, Interrupted (a KeyboardInterrupt) where a signal stopped it. rehearse:
        try all stages in short before the first begins.
        """
        if overwrite_checkpoints is None:
            overwrite_checkpoints = os.environ.get(OVERWRITE_VARIABLE, "") not in ("", "0")
        with alone(self.folder, self.runtime), self.runtime.stopping.listening():
            return self._run_all(overwrite_checkpoints, rehearse)

    def _run_all(self, overwrite_checkpoints: bool, rehearse: bool) -> Run:
        folders = [f"{i:02d}-{name}" for i, name in enumerate(self.names, 1)]
        if rehearse:
            rehearse_stages(self, [] if overwrite_checkpoints else folders)
        run = begin_run(
            self.folder,
            runtime=self.runtime,
            stages=folders,
            settings=[self._settings(stage) for stage in self.stages],
            model=self.model,
            seed=self.seed,
            overwrite=overwrite_checkpoints,
        )
        if any(INITIAL in stage.weights_used() for stage in self.stages):
            save_initial(run, self.token_model, self.model, self.runtime)
        self._run = run
        total = len(self.stages)
        first = next((i for i in range(total) if not run.is_done(i)), total)
        if first > 0:
            logger.info("%d of %d stages are done already in %s", first, total, self.folder)
            self.token_model.load(run.weights(first - 1))
        for place in range(max(first - 1, 0), total):
            if place >= first:
                self._run_stage(run, place)
            self._drop_old_weights(run, place)
        if self.merge_adapter and self.runtime.is_main:
            beside = with_card(run, self.names[-1], self.tokens.save)
            save_folder(adapt(merged(self.model)), self.folder / MERGED, beside)
        if self.report and self.runtime.is_main:
            report_at_end(run)
        self.runtime.barrier()
        self.runtime.end_trackers()
        return run

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the model's weights to a safetensors file; a relative path is within the run."""
        target = self.folder / path
        if self.runtime.from_main(target.exists()) and not overwrite:
            raise StoreError(f"{target} exists; pass overwrite=True to replace it.")
        if self.runtime.is_main:
            write_weights(self.model, target)
        self.runtime.barrier()

    def _run_stage(self, run: Run, place: int) -> None:
        stage, name, ctx = self.stages[place], self.names[place], self._context(place)
        if stage.init_from != "previous":
            ctx.load(stage.init_from)
        beside = with_card(run, name, self.tokens.save)
        before = sum(run.summary(i).get("steps", 0) for i in range(place))
        out = StageDir(run.stage(place).path, self.runtime, beside, steps_before=before)
        out.begin(self._settings(stage))
        logger.info("stage %d of %d: %s", place + 1, len(self.stages), name)
        with ends_told(out.tell):
            stage.run(ctx, out)
        out.save_weights(self.token_model)
        tell_trained(self.callbacks, ctx, out)
        out.finish()
        if self.runtime.is_main:
            show_stage(run, name, self.runtime, before + out.summary.get("steps", 0))
            tell_ended(self.callbacks, run, name, self.model)
        self.runtime.barrier()

    def _drop_old_weights(self, run: Run, place: int) -> None:
        needed: set[str] = set().union(*(s.weights_used() for s in self.stages[place + 1 :]))
        for old in range(place + 1 - (self.keep_stages or len(self.stages))):
            if self.names[old] not in needed:
                StageDir(run.stage(old).path, self.runtime).drop_weights("model")

    def _context(self, place: int) -> Context:
        stage, name, earlier = self.stages[place], self.names[place], self.names[:place]
        for error in wrong_names(stage, name, earlier):
            raise error
        self.tokens.compare_template(name, Path(stage.init_from))

        def resolve(source: FromStage) -> Sequence[Any]:
            assert self._run is not None
            return self._run.training_data(source.stage)

        datasets = stage.datasets()
        if self._run is None:
            rows = {field: Rows(data, field, resolve) for field, data in datasets.items()}
        else:
            rows = dict(self.contexts[place].rows)
            for opened in rows.values():
                opened.forget_stages()
        return Context(
            stage=name,
            seed=self.seed,
            model=self.token_model,
            policy=self.policy,
            engine=self.engine,
            tokens=self.tokens,
            runtime=self.runtime,
            rewards=self.rewards,
            adapt=self._adapt,
            rows=rows,
            first_prompt=self._first_prompt(place),
            run=self._run,
            earlier=earlier,
        )

    def _adapt(self, module: nn.Module) -> TokenModel:
        return adapt(module.to(self.runtime.device))

    def _first_prompt(self, place: int) -> int:
        """Where the last stage before this one with the same prompts stopped."""
        mine = self.stages[place]
        prompts = mine.datasets().get("prompt_dataset")
        if self._run is None or prompts is None or getattr(mine, "reuse_prompts", False):
            return 0
        for i in reversed(range(place)):
            if _same(self.stages[i].datasets().get("prompt_dataset"), prompts):
                return self._run.summary(i).get("next_prompt", 0)
        return 0

    def _settings(self, stage: FinetuneConfig) -> dict[str, Any]:
        prompts = {name: fingerprint_of(self.rewards.get(name)) for name in stage.reward_names()}
        return {
            "stage": type(stage).__name__,
            "settings": fingerprint_of(stage),
            "reward_prompts": prompts,
            "seed": self.seed,
            "eos_id": self.tokens.eos_id,
            "chat_template": (self.tokens.template or "own") if self.tokens.renders else None,
        }

    def _check_pad(self, pad_id: int | None) -> None:
        if pad_id is not None and not -1 <= pad_id < self.token_model.vocab:
            raise ConfigError(
                f"pad_id must be a token of the model, 0 to {self.token_model.vocab - 1} (or be "
                f"left out, it is not needed); got {pad_id}."
            )


def _rewards(given: RewardConfig | Mapping[str, RewardConfig] | None) -> dict[str, RewardConfig]:
    if given is None:
        return {"default": DEFAULT_REWARD_CONFIG}
    return {"default": given} if isinstance(given, RewardConfig) else dict(given)


def _tokenizer(
    tokenizer: Tokenizer | None,
    encode: Callable[[str], Any] | None,
    decode: Callable[[Tensor], str] | None,
) -> Tokenizer | None:
    if tokenizer is not None and (encode is not None or decode is not None):
        raise ConfigError("give tokenizer, or tokenizer_encode and tokenizer_decode, not both.")
    if (encode is None) != (decode is None):
        raise ConfigError("tokenizer_encode and tokenizer_decode go together; one is missing.")
    if encode is not None and decode is not None:
        return CallableTokenizer(encode, decode)
    return tokenizer


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, str | Path) and str(one) == str(other))


class SPINTrainer(SelfRewardingTrainer):
    """A trainer of one SPIN stage (arXiv:2401.01335).

    train_sft_dataset: rows with a prompt and a completion, as for SFT. spin_lambda, or
    spin_kwargs=dict(λ=...): lambda of Eq. 4.7. checkpoint_every: steps between copies of the
    weights. checkpoint_folder is the run directory; the other arguments are those of
    SelfRewardingTrainer and OptimConfig.
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
