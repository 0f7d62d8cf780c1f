"""Where the modules of version 0.1.0 are now. Kept for one release, then it goes.

A run that version 0.1.0 began names functions and classes by these module paths in its config.json;
whoever imports one of them is told the new place.
"""

from importlib.abc import MetaPathFinder
from typing import Any

PACKAGE = "self_rewarding_lm"

MODULES = {
    "adapters": "models",
    "adapters.attending": "models.sessions",
    "adapters.base": "models.trial",
    "adapters.classifiers": "models.loading",
    "adapters.hub": "report.card",
    "adapters.hugging_face": "models.hugging_face",
    "adapters.inference": "models.inference",
    "adapters.key_values": "models.attention",
    "adapters.loading": "models.loading",
    "adapters.named": "models.loading",
    "adapters.packing": "models.packing",
    "adapters.padded": "models.hugging_face",
    "adapters.plain": "models.plain",
    "adapters.policy": "models.policy",
    "adapters.pretrained": "runs.pretrained",
    "adapters.sessions": "models.sessions",
    "adapters.training": "models.trial",
    "adapters.x_transformers": "models.x_transformers",
    "agreement": "evaluation.agreement",
    "anchor": "evaluation.anchor",
    "answering": "evaluation.head_to_head",
    "asking": "judges.asking",
    "batching": "models.batching",
    "callbacks": "runs.callbacks",
    "card": "report.card",
    "chat": "data.chat",
    "checkpoints": "evaluation.head_to_head",
    "checks": "checks",
    "cli": "cli",
    "cli_evaluate": "cli.judge",
    "closed": "config",
    "comparing": "judges.self_judge",
    "config": "config",
    "consistency": "judges.consistency",
    "context": "context",
    "contrasts": "stages.contrastive",
    "controls": "data.control_tokens",
    "datasets": "data.datasets",
    "decoding": "generation.engine",
    "durable": "runs.atomic",
    "early_stopping": "training.early_stopping",
    "encoding": "data.tokenizers",
    "engine": "generation.local",
    "ensemble": "judges.ensemble",
    "errors": "errors",
    "evaluate": "evaluation.judge_quality",
    "events": "runs.stage_folder",
    "expected": "judges.expected",
    "export": "report.export",
    "files": "data.files",
    "fingerprints": "runs.fingerprint",
    "fit": "training.fit",
    "flight": "generation.flight",
    "forms": "data.forms",
    "forwards": "training.forwards",
    "head_to_head": "evaluation.head_to_head",
    "held_out": "evaluation.held_out",
    "implicit": "judges.implicit",
    "instruct": "stages.self_instruct",
    "instruct.few_shot": "stages.self_instruct.few_shot",
    "instruct.filters": "stages.self_instruct.filters",
    "instruct.reading": "stages.self_instruct.reading",
    "judge_quality": "evaluation.judge_quality",
    "judges": "judges.base",
    "judging": "judges.parsing",
    "lines": "runs.lines",
    "live_reference": "training.reference",
    "lock": "runs.lock",
    "logprobs": "models.logprobs",
    "loss_settings": "training.loss_config",
    "losses": "training.losses",
    "making_judges": "judges.make",
    "meta": "stages.meta_rewarding",
    "oasst": "data.oasst",
    "objectives": "training.objectives",
    "optimizers": "training.optimizers",
    "pair_settings": "stages.pairing",
    "pairing": "stages.pairing",
    "planning": "recipes.plan",
    "planning.asking": "stages.work",
    "planning.blocks": "recipes.plan.model",
    "planning.disk": "recipes.plan.disk",
    "planning.kinds": "stages.work",
    "planning.lengths": "stages.lengths",
    "planning.machine": "recipes.plan.machine",
    "planning.memory": "recipes.plan.memory",
    "planning.phases": "recipes.plan.phases",
    "planning.plan": "recipes.plan.plan",
    "planning.ranges": "stages.ranges",
    "planning.shape": "recipes.plan.model",
    "planning.states": "recipes.plan.memory",
    "planning.table": "recipes.plan.table",
    "planning.trained": "stages.work",
    "planning.work": "stages.work",
    "progress": "runtime",
    "prompts": "stages.self_instruct.write",
    "quality": "evaluation.responses",
    "ranked": "data.ranked",
    "recipe_file": "recipes.reader",
    "recipe_reader": "recipes.reader",
    "recipe_settings": "recipes.settings",
    "recipe_text": "recipes.settings_file",
    "recipe_yaml": "recipes.yaml_nodes",
    "recipes": "recipes.paper",
    "records": "records",
    "reference": "training.reference",
    "rehearsal": "stages.rehearsal",
    "report": "report.page",
    "reporting": "report",
    "reporting.charts": "report.charts",
    "reporting.examples": "report.examples",
    "reporting.figures": "report.figures",
    "reporting.live": "report.terminal",
    "reporting.markup": "report.markup",
    "reporting.page": "report.page",
    "reporting.words": "report.words",
    "reward_model": "judges.reward_model",
    "rollout": "generation.candidates",
    "rows": "data.rows",
    "rubrics": "rubrics",
    "run": "runs.run",
    "runtime": "runtime",
    "sampling": "generation.sampling",
    "schedule": "generation.schedule",
    "score_trie": "generation.score_trie",
    "server": "generation.server",
    "server.chances": "generation.server.chances",
    "server.completions": "generation.server.completions",
    "server.engine": "generation.server.engine",
    "server.http_client": "generation.server.client",
    "server.process": "generation.server.process",
    "server_judge": "judges.server",
    "serving": "context",
    "settings": "describe",
    "sharding": "sharding",
    "show": "report.terminal",
    "spin_trainer": "trainer",
    "stages": "stages",
    "stages.base": "stages.base",
    "stages.contrastive": "stages.contrastive",
    "stages.dpo": "stages.dpo",
    "stages.eft": "stages.eft",
    "stages.eft_builder": "stages.eft",
    "stages.eft_comparisons": "stages.eft",
    "stages.eft_replies": "stages.eft",
    "stages.external": "stages.external",
    "stages.judge_pairs": "stages.meta_rewarding",
    "stages.meta": "stages.meta_rewarding",
    "stages.pair_maker": "stages.pair_maker",
    "stages.pair_report": "stages.pair_maker",
    "stages.positive": "stages.self_reward_sft",
    "stages.preference": "stages.preference",
    "stages.rounds": "stages.sampled",
    "stages.sampled": "stages.sampled",
    "stages.self_reward": "stages.self_reward",
    "stages.sft": "stages.sft",
    "stages.spin": "stages.spin",
    "stages.targets": "stages.eft",
    "stages.temporal": "stages.temporal",
    "statements": "judges.parsing",
    "stopping": "runtime",
    "store": "runs.stage_folder",
    "stored": "runs.stored",
    "tally": "judges.tally",
    "tokens": "data.tokens",
    "trainer": "trainer",
    "training_state": "training.state",
    "trie_walk": "generation.local",
    "verifying": "evaluation.verifying",
    "votes": "judges.votes",
    "watching": "judges.tally",
    "weights": "runs.weights",
}
"""Old module -> new module, both without the package's name."""


NAMES = {
    "adapters": {
        "models.families": "adapt",
        "runs.pretrained": "load_into",
    },
    "adapters.base": {
        "models.interface": "TokenModel copied device_of limit_of logits_of not_checkpointed",
    },
    "adapters.hugging_face": {
        "runs.pretrained": "is_hugging_face",
    },
    "adapters.sessions": {
        "models.interface": "Cache Plan Session free_bytes",
    },
    "adapters.training": {
        "models.batching": "grouped packs",
        "models.interface": "Training",
    },
    "agreement": {
        "stats": "bootstrap kendall_tau_b spearman",
    },
    "batching": {
        "runs.lines": "batched",
    },
    "checkpoints": {
        "evaluation.contexts": "checkpoint opened",
    },
    "cli_evaluate": {
        "evaluation.tables": "comparison_table judge_table",
    },
    "datasets": {
        "config": "FromStage from_stage",
    },
    "engine": {
        "generation.engine": "Engine",
    },
    "evaluate": {
        "data.ranked": "Asked as_candidates",
        "evaluation.contexts": "open_context",
    },
    "files": {
        "report.export": "write_rows",
    },
    "judges": {
        "judges.functions": "FunctionJudge ModuleJudge reward_scores",
        "judges.self_judge": "SelfJudge SeveralJudges check_judge_prompt form_of score_parser",
    },
    "judging": {
        "judges.templates": "compile_comparison_template compile_meta_template "
        "compile_prompt_template template_parts",
        "scores": "ParsedScore both_orders candidate_scores label_of mean_score score_of",
    },
    "quality": {
        "stats": "Interval Rate fit_logistic ratio_interval wilson_interval",
    },
    "recipes": {
        "recipes.paper": "paper_config_of",
    },
    "reference": {
        "models.policy": "response_logprobs",
    },
    "rehearsal": {
        "training.fit": "Trial",
    },
    "report": {
        "report.page": "report_at_end",
    },
    "reporting.markup": {
        "text": "duration number",
    },
    "reporting.live": {
        "report.live": "show_stage",
    },
    "run": {
        "runs.resume": "begin_run save_initial",
    },
    "sampling": {
        "records": "stable_hash",
    },
    "show": {
        "text": "aligned",
    },
    "statements": {
        "scores": "number_text",
    },
    "store": {
        "runs.stage_files": "StageFiles check_ours read_json",
    },
    "trainer": {
        "stages.base": "stage_names",
    },
    "watching": {
        "training.watch": "Watcher",
    },
}
"""Old module -> file -> names that are there, not in the file that MODULES gives; of old modules
that are packages now, all names.
"""


class MovedModules(MetaPathFinder):
    """Answers an import of an old module, or of a name of one, with an error that says where it is.

    Python asks it last, so only for modules that are not there. Some old modules have become
    packages (judges, recipes, report): of a name that is not at the package's door Python asks for
    a module of that name within the package, and so comes here too.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """None for a name that version 0.1.0 did not have either; else raises ImportError."""
        package, _, asked = fullname.partition(".")
        if package == PACKAGE and (where := new_place(asked)) is not None:
            raise ImportError(f"{fullname} was moved. {where}", name=fullname)


def new_place(asked: str) -> str | None:
    """Where an old module, or `<old module>.<name>`, is now, as a sentence; None if neither."""
    module, _, name = asked.rpartition(".")
    for file, names in NAMES.get(module, {}).items():
        if name in names.split():
            return f"Import it from {PACKAGE}.{file}."
    if asked not in MODULES:
        return None
    others = list(NAMES.get(asked, {}).items())
    others += [(new, old) for old, new in MODULES.items() if old.startswith(f"{asked}.")]
    places = [MODULES[asked], *(f"{file} ({what})" for file, what in others)]
    return f"Import from {'; '.join(f'{PACKAGE}.{place}' for place in places)}."


def without_module(name: str) -> str:
    """The name of one of the library's own objects without its module of version 0.1.0.

    `self_rewarding_lm.votes.VoteJudge` becomes `self_rewarding_lm.VoteJudge`; any other text stays
    as it is.
    """
    package, _, rest = name.partition(".")
    if package != PACKAGE:
        return name
    parts = rest.split(".")
    for count in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:count]) in MODULES:
            return ".".join([package, *parts[count:]])
    return name
