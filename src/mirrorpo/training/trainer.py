"""TRL's ``GRPOTrainer`` with any objective of this library in place of its loss.

Few overrides: the loss, the rewards (captured) and the advantages (computed from them), the gradient norm (checked).
Everything else, from generation to checkpoints, is TRL's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from mirrorpo.config.train import TeacherSpec, check_teacher
from mirrorpo.losses.advantages import advantages as group_advantages
from mirrorpo.losses.objective import Objective, Output
from mirrorpo.models import for_vllm, resolve_model
from mirrorpo.models.generation import bare_generation, causal_part
from mirrorpo.models.thresholds import count_positions, forget_lengths
from mirrorpo.training.config import MirrorConfig, teacher_from
from mirrorpo.training.distributed import UNSHARDED, check_equal, quantiles_over_ranks, reduce_metrics, trainer_settings
from mirrorpo.training.loss import LossComputer, LossSettings, Moment, carried, needs_padding, regroup
from mirrorpo.training.model_adapter import budget_advice, check_reference
from mirrorpo.training.monitors import ROUNDING, Watch, add_objective, paper_of, say_at_start
from mirrorpo.training.nonfinite import NonFinite, NonFiniteError
from mirrorpo.training.records import Stopwatch
from mirrorpo.training.resuming import PenaltyState, ResumableTrainer, load_state, resumed_lines, save_state
from mirrorpo.training.rewards import BackgroundReward, background, begin_rewards, guarded
from mirrorpo.training.rollouts import Rollouts, check_sampler, vllm_as_trained
from mirrorpo.training.scoring import FORWARD_KEYS, PackedPath, Scored, Scorer, gather_ids
from mirrorpo.training.teacher import Teacher, TeacherError, behind, needs_logps
from mirrorpo.training.trl_loss import add_trl_names

logger = logging.get_logger(__name__)

_COMPLETIONS = 3  # where the texts stand in what TRL's `_generate` returns
# The penalty's share of the gradient is measured once more, early, when the policy has left its reference.
_EARLY_LOOK = 5


class MirrorTrainer(ResumableTrainer):
    """``trl.GRPOTrainer`` that optimises a ``mirrorpo`` objective.

    Takes everything that ``GRPOTrainer`` takes; ``args`` is a ``MirrorConfig``.

    Args:
        model: as in TRL, or ``"builtin:tiny"``. Pass a path if the objective has a penalty: TRL loads the reference
            from it.
        reward_funcs: as in TRL.
        args: the configuration; its ``objective`` says what is optimised.
        objective: an ``Objective`` built by hand, in place of ``args.objective``.
        **kwargs: as in TRL (``train_dataset``, ``processing_class``, ``peft_config``, ``callbacks``, ...).

    Raises:
        ValueError: ``args`` is no ``MirrorConfig``; a reference that is the policy itself or never was its start;
            settings that differ between the processes of a run.

    Example:
        >>> from mirrorpo.training import MirrorConfig, MirrorTrainer
        >>> trainer = MirrorTrainer(  # doctest: +SKIP
        ...     model="Qwen/Qwen3-1.7B", reward_funcs=my_reward, train_dataset=dataset,
        ...     args=MirrorConfig("out", objective="prob_l2_grpo"),
        ... )
    """

    _tag_names = ("trl", "mirrorpo")
    _name = "mirrorpo"

    args: MirrorConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: MirrorConfig | None = None,
        *,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = MirrorConfig("mirrorpo-output")
        if not isinstance(args, MirrorConfig):
            raise ValueError(f"args must be a MirrorConfig, got {type(args).__name__}")
        if objective is not None:
            args.adopt(objective)
        self.policy_objective = carried(
            args.resolved_objective(), args, drawn_here=not args.use_vllm and "rollout_func" not in kwargs
        )
        self._paper = paper_of(self.policy_objective)
        if isinstance(model, str):
            model = resolve_model(model)
            model = for_vllm(model) if args.use_vllm and args.vllm_mode == "colocate" else model
        self._rewards_per_func: Tensor | None = None
        self._rows: list[dict[str, Any]] = []
        self._background: list[BackgroundReward] = []
        self._step_total: Tensor | float = 0.0
        self._clock = Stopwatch()
        self._flat = False  # no completion of the batch has an advantage
        self._step_distance = 0.0
        self.nonfinite = NonFinite(args.on_nonfinite, args.max_nonfinite)
        if reward_funcs is not None:
            functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
            self._background = background(functions)
            reward_funcs = [guarded(function, args.on_reward_error, args.reward_seconds) for function in functions]
        self.penalty_state = PenaltyState(self.policy_objective.control)
        spec = None if args.teacher is None else teacher_from(args.teacher)
        check_teacher(self.policy_objective, spec)
        if spec is not None and "teacher" not in self.policy_objective.needs:
            logger.warning("teacher has no effect: objective %r has no penalty toward it", self.policy_objective.name)
            spec = None
        check_equal(trainer_settings(args, self.policy_objective))
        with vllm_as_trained(self):
            super().__init__(model, reward_funcs=reward_funcs, args=args, **kwargs)
        self._check_reference()
        if self.accelerator.is_main_process:
            check_sampler(self)
        self.teacher = None if spec is None else self._load_teacher(spec)
        self.watch = Watch(self.policy_objective, self.ref_model)  # pyright: ignore[reportArgumentType]
        self.add_callback(self.watch)
        for one in (self.model, self.ref_model, None if self.teacher is None else self.teacher.model):
            if one is not None:
                count_positions(causal_part(self.accelerator.unwrap_model(one)))
        say_at_start(self.accelerator, self.model)
        needs_logits = needs_padding(self.policy_objective)
        self.packed = PackedPath(args, self.accelerator, self.temperature, self.aux_loss_enabled, needs_logits)
        self.loss_computer = self._loss_computer()
        elsewhere = args.use_vllm or args.use_transformers_continuous_batching
        self.rollouts = Rollouts(None if elsewhere else self.generation_config, self.accelerator, args.rollouts)
        if self.accelerator.is_main_process:
            # Not a warning, but what TRL users must see without configuring a logger.
            teacher = "" if self.teacher is None else f"; teacher: {self.teacher.describe()}"
            logger.warning(
                "%s; reference: %s%s", self.policy_objective.describe(), self.reference_description(), teacher
            )

    def objective_line(self) -> str:
        """What is optimised, in one line."""
        return self.policy_objective.describe()

    def reference_description(self) -> str:
        """Where the penalty is measured from, in a few words."""
        if not self.policy_objective.needs_reference:
            return "none"
        if self.ref_model is None:
            return "the policy with its adapter off"
        if self.args.sync_ref_model:
            return f"a copy, mixed with the policy every {self.args.ref_model_sync_steps} steps"
        return "a frozen copy of the policy's start"

    def _check_reference(self) -> None:
        if self.ref_model is None:
            return
        # Sharded parameters cannot be compared one by one; there the copy is at least a load of its own.
        if self.accelerator.distributed_type in UNSHARDED:
            unwrap = self.accelerator.unwrap_model
            check_reference(unwrap(self.model), unwrap(self.ref_model))

    def _load_teacher(self, spec: TeacherSpec) -> Teacher:
        if spec.url is None and self.accelerator.distributed_type not in UNSHARDED:
            raise ValueError("teacher.path and teacher.prefix need a model that is not sharded. Legal: teacher.url")
        given_options: Any = self.args.model_init_kwargs
        options: Any = {"dtype": "float32", **(given_options or {})}
        policy = self.accelerator.unwrap_model(self.model)
        teacher = Teacher(spec, policy, self.processing_class, self.temperature, dtype=options["dtype"])
        if teacher.model is not None:
            teacher.model = self.accelerator.prepare_model(teacher.model, evaluation_mode=True)
        return teacher

    def _teacher_scores(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> dict[str, Tensor]:
        """What the teacher says of a rollout batch, as more of its tensors."""
        assert self.teacher is not None

        @torch.no_grad()
        def score(model: nn.Module | None, ids: Tensor, attention: Tensor, keep: int) -> Tensor:
            given = (self.model if model is None else model, ids, attention, keep)
            return self._get_per_token_logps_and_entropies(*given, batch_size=self.args.per_device_train_batch_size)[0]

        prefix, prompts = self.teacher.spec.prefix, [row["prompt"] for row in inputs]
        ids = None if prefix is None else self._tokenize_prompts(behind(prefix, prompts))[0]
        found = self.teacher.read(output, ids, score if needs_logps(self.policy_objective) else None)
        if "teacher_entries" in found:
            covered = found["teacher_entries"].exp().sum(-1)[output["completion_mask"].bool()].mean().item()
            for name, value in (("covered", covered), ("tail", max(0.0, 1.0 - covered))):
                self._metrics["train" if self.model.training else "eval"][f"teacher/{name}/mean"].append(value)
        return found

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, which also names the objective, its paper and this library."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_objective(Path(str(self.args.output_dir)) / "README.md", self.policy_objective)

    # What a resumed run needs beyond TRL's checkpoint

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            with budget_advice(self.packed, self.model):
                loss = super().training_step(*args, **kwargs)
        except TeacherError:
            self._keep_what_is_trained()
            raise
        if self.accelerator.sync_gradients:
            self._settle_nonfinite()
            self._skip_noise()
            self.penalty_state.step((self.state.global_step + 1) / max(1, self.state.max_steps))
        return loss

    def _settle_nonfinite(self) -> None:
        if not self.nonfinite.skips:
            return
        unit = "tokens" if self.policy_objective.aggregation == "token_mean" else "sequences"
        total = float(self._step_total) * self.accelerator.num_processes
        step = self.state.global_step + 1
        for name, value in self.nonfinite.settle(self.model, self.accelerator, total, unit, step).items():
            self._metrics["train"][name].append(value)

    def _skip_noise(self) -> None:
        """Leaves out an update that no advantage moves from a policy that equals its reference.

        Its gradient is the penalty's at its minimum: rounding noise, which Adam scales to full steps.
        """
        distance, self._step_distance = self._step_distance, 0.0
        objective = self.policy_objective
        # Toward another anchor there is a gradient at the start, too.
        judged = objective.placed("loss") and all(p.anchor == "reference" for p in objective.penalties)
        if not judged or not self._flat or distance > ROUNDING or self._other_terms():
            return
        if self.accelerator.distributed_type not in UNSHARDED:
            return  # sharded gradients belong to their library
        for parameter in self.model.parameters():
            parameter.grad = None
        self.watch.skipped()

    def _other_terms(self) -> bool:
        """Whether the loss has terms of TRL's beside the objective."""
        return self._entropy_bonus_enabled or self.aux_loss_enabled

    def _distance(self, metrics: dict[str, Any]) -> Any:
        """How far the policy is from its reference, by the measure at hand."""
        first = f"divergence/{self.policy_objective.penalty_labels[0]}/mean"
        return metrics.get("divergence/reverse_kl/mean", metrics.get(first, 1.0))

    def _progress(self) -> dict[str, Any]:
        return {
            **super()._progress(),
            "nonfinite": self.nonfinite.events,
            "packed": self.packed.state(),
            "rollouts": self.rollouts.state(),
            "flat": self._flat,
        }

    def _take_up(self, kept: dict[str, Any]) -> None:
        super()._take_up(kept)
        self.nonfinite.events = kept["nonfinite"]
        self._flat = kept.get("flat", False)  # not in a checkpoint of 0.1
        if "packed" in kept:  # not in a checkpoint of 0.1
            self.packed.take_up(kept["packed"])
        if "rollouts" in kept:
            self.rollouts.take_up(kept["rollouts"])

    def _save_more(self, folder: Path) -> None:
        averaged = self.accelerator.unwrap_model(self.ref_model) if self.args.sync_ref_model else None
        save_state(folder, self.penalty_state, averaged, self.policy_objective.describe())

    def _restore_more(self, checkpoint: Path) -> None:
        averaged = self.accelerator.unwrap_model(self.ref_model) if self.args.sync_ref_model else None
        before = load_state(checkpoint, self.penalty_state, averaged)
        if self.accelerator.is_main_process:
            for line in resumed_lines(checkpoint, before, self.policy_objective.describe()):
                logger.warning("%s", line)

    # Rollouts, rewards and advantages

    def _generate_single_turn(self, prompt_ids: Any, images: Any, fields: Any, *more: Any, **named: Any) -> Any:
        found = None
        if not (images or fields or self.use_vllm):
            found = self.rollouts.complete(self.accelerator.unwrap_model(self.model_wrapped), prompt_ids)
        theirs = super()._generate_single_turn
        return (found, None) if found is not None else theirs(prompt_ids, images, fields, *more, **named)

    def _generate(self, prompts: list[Any]) -> Any:
        forget_lengths(self.model)
        with self._clock("generation"), bare_generation(self.accelerator.unwrap_model(self.model)):
            output = super()._generate(prompts)
        begin_rewards(self._background, self._rows, output[_COMPLETIONS])  # beside the forward passes that follow
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._clock("reward"):
            rewards = super()._calculate_rewards(*args, **kwargs)
        rewards = self.nonfinite.leave_out_rewards(rewards, self.reward_func_names, self.state.global_step + 1)
        self._rewards_per_func = rewards
        self._metrics["train" if self.model.training else "eval"]["unscored/frac"].append(
            rewards.isnan().all(dim=1).float().mean().item()
        )
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._clock("scoring"):
            output = self._rollout_batch(inputs)
        seconds, metrics = self._clock.take(), self._metrics["train" if self.model.training else "eval"]
        for phase, took in seconds.items():
            metrics[f"{phase}_seconds"].append(took)
        drawn = int(output["completion_mask"].sum()) * self.accelerator.num_processes  # as many as here on each, about
        metrics["tokens_per_second"].append(drawn / max(seconds["generation"], 1e-9))
        return output

    def _rollout_batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with the objective's advantages and what its anchors need."""
        self._rows = inputs
        output = super()._generate_and_score_completions(inputs)
        output.update({} if self.teacher is None else self._teacher_scores(inputs, output))
        penalty = self._reward_penalty(output) if self.policy_objective.placed("reward") else None
        output["advantages"] = self._advantages(output["advantages"], penalty)
        if "old" in self.policy_objective.needs_logits_of:
            size = self.args.per_device_train_batch_size
            output["old_logits"] = self.loss_computer.scorer.logits_in_parts(self.model, output, size)
        return output

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or not self._may_regroup():
            return inputs
        assert self._buffered_inputs is not None
        self._buffered_inputs = regroup(self._buffered_inputs, self.args.gradient_accumulation_steps)
        return self._buffered_inputs[self._step % len(self._buffered_inputs)]

    def _may_regroup(self) -> bool:
        """Whether groups may be put together in micro-batches: where no number depends on who shares one."""
        control = self.policy_objective.control
        by_micro_batch = (
            self.top_entropy_quantile < 1.0  # a quantile within the micro-batch
            or self._entropy_bonus_enabled  # a token mean within it
            or (control is not None and control.kind == "adaptive")  # the same
        )
        # A window that reaches into the next rollout batch has no fixed set of completions.
        whole_windows = (self.args.steps_per_generation or 1) % self.args.gradient_accumulation_steps == 0
        return self.packed.reason is None and not self._is_vlm and whole_windows and not by_micro_batch

    def _reward_penalty(self, output: dict[str, Any]) -> Tensor:
        """(B,) of this rank: what ``placement: reward`` subtracts from each completion's reward."""
        logp = output.get("old_per_token_logps")
        if logp is None:
            ids, attention, keep = gather_ids(output)
            with torch.no_grad():
                logp, _, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids, attention, keep, batch_size=self.args.per_device_train_batch_size
                )
        mask = output["completion_mask"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        uniform = "uniform" in self.policy_objective.needs
        vocabulary = self.loss_computer.scorer.vocabulary(self.model) if uniform else None
        penalty = self.policy_objective.reward_penalty(
            logp,
            output.get("ref_per_token_logps"),
            mask,
            self.penalty_state.factor,
            logp_sampler=output.get("sampling_per_token_logps"),
            logp_teacher=output.get("teacher_per_token_logps"),
            vocabulary=vocabulary,
        )
        everyone: Tensor = self.accelerator.gather(penalty)  # pyright: ignore[reportAssignmentType]
        self._metrics["train" if self.model.training else "eval"]["reward_penalty"].append(everyone.mean().item())
        return everyone

    def _advantages(self, computed: Tensor, penalty: Tensor | None) -> Tensor:
        """This rank's advantages, from the rewards of all ranks (a group may lie on two)."""
        rewards = self._rewards_per_func
        assert rewards is not None
        unscorable = rewards.isnan().all(dim=1)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        total[unscorable] = math.nan
        if penalty is not None:
            total = total - penalty.to(total)
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        if group_size is None or group_size < 2:  # one completion per prompt, in an evaluation
            return computed
        everyone = group_advantages(total, group_size, self.policy_objective.advantage)
        if self.model.training:
            self._flat = not bool(everyone.nan_to_num().any())
        local = computed.shape[0]
        return everyone[self.accelerator.process_index * local :][:local].to(computed)

    # The loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        training = self.model.training
        forget_lengths(model)
        found = self.loss_computer(model, inputs, self._moment(training))
        if training:
            self._step_total = found.total
        if found.penalty_share is not None:
            self._metrics["train"]["penalty_gradient_share"].append(found.penalty_share)
            self.watch.measured(
                self.state.global_step, found.penalty_share, float(self._distance(found.output.metrics))
            )
        old = inputs.get("old_per_token_logps")
        self._record(found.output, found.scored, old, found.mask, "train" if training else "eval")
        return found.loss

    def _moment(self, training: bool) -> Moment:
        return Moment(
            step=self.state.global_step + 1,
            training=training,
            accumulation=self.current_gradient_accumulation_steps,
            penalty_factor=self.penalty_state.factor,
            with_share=training and self._share_is_due(),
        )

    def _share_is_due(self) -> bool:
        """Whether this micro-batch is one to measure the penalty's share of the gradient on."""
        if not self.policy_objective.placed("loss") or self.accelerator.distributed_type not in UNSHARDED:
            return False  # sharded gradients have no norm of their own
        step, every = self.state.global_step, self.args.gradient_share_every
        return every > 0 and (step % every == 0 or step == _EARLY_LOOK)

    def adopt(self, objective: Objective) -> None:
        """Trains another objective of the same kind from here on, as the search does with each map."""
        self.policy_objective = objective
        self.penalty_state = PenaltyState(objective.control)
        self.loss_computer = self._loss_computer()

    def _loss_computer(self) -> LossComputer:
        scorer = Scorer(
            self.packed,
            self.accelerator,
            self.temperature,
            self.ref_model,
            super()._get_per_token_logps_and_entropies,  # the trainer's own would pack
            self.aux_loss_enabled,
            None if self.teacher is None else self.teacher.model,
        )
        settings = LossSettings(
            max_completion_length=self.max_completion_length,  # pyright: ignore[reportArgumentType]
            num_processes=self.accelerator.num_processes,
            steps_per_generation=self.args.steps_per_generation or 1,
            entropy_bonus=self.entropy_coef if self._entropy_bonus_enabled else 0.0,
            aux_loss=self.router_aux_loss_coef if self.aux_loss_enabled else 0.0,
            top_entropy_quantile=self.top_entropy_quantile,
            off_policy_mask_threshold=self.off_policy_mask_threshold,
        )
        return LossComputer(self.policy_objective, scorer, settings, self.nonfinite, self.get_high_entropy_mask)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Policy, old and reference log-probabilities: from packed rows where that is supported, else TRL's way."""
        forget_lengths(model)
        if not any(value is not None for key, value in kwargs.items() if key in FORWARD_KEYS):
            rows = batch_size or input_ids.shape[0]
            found = self.packed.score(model, input_ids, attention_mask, logits_to_keep, rows, compute_entropy)
            if found is not None:
                return *found, None
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
        )

    # Checks and metrics

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With float16 the scaler meets infinite gradients as a matter of course, and skips the step by itself.
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            self.nonfinite.drop_gradient(model, float(norm), self.state.global_step + 1)
            self._metrics["train"]["nonfinite/dropped/frac"][-1] = 1.0
        return norm

    def _record(self, output: Output, scored: Scored, old: Tensor | None, mask: Tensor, mode: str) -> None:
        tokens = mask.sum()
        # TRL logs the extremes over processes too.
        extremes = {"low/min": output.metrics["clip/low/frac"], "high/max": output.metrics["clip/high/frac"]}
        metrics = {**output.metrics, **extremes}
        values = reduce_metrics(self.accelerator, metrics, tokens)
        if old is not None and self.accelerator.num_processes > 1:
            values |= quantiles_over_ranks(self.accelerator, scored.logp - old, mask)
        if self.policy_objective.penalties:
            first, label = self.policy_objective.penalties[0], self.policy_objective.penalty_labels[0]
            values["coefficient"] = first.coefficient * self.penalty_state.factor
            if mode == "train":
                self.penalty_state.observe(values[f"divergence/{label}/mean"])
                self._step_distance = max(self._step_distance, abs(self._distance(values)))
        add_trl_names(values)
        for name, value in values.items():
            self._metrics[mode][name].append(value)


__all__ = ["MirrorTrainer", "NonFiniteError"]
