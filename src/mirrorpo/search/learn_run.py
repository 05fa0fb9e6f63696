"""Runner of ``mirrorpo learn``: a training that learns its own penalty, and the files that it adds to a training's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from mirrorpo.config.search import LearnRecipe, LearnSpec
from mirrorpo.divergences.neural.file import map_text
from mirrorpo.divergences.neural.map import MirrorMap
from mirrorpo.divergences.slope import score
from mirrorpo.errors import InputError
from mirrorpo.files import write_text_atomic
from mirrorpo.losses.advantages import advantages as group_advantages
from mirrorpo.losses.presets import objective_from
from mirrorpo.runs.folder import RunFolder
from mirrorpo.search.learning import Tokens, Variable, change_along, hypergradient, preconditioned, size_of
from mirrorpo.search.member import held_out
from mirrorpo.tasks import Row
from mirrorpo.training.checkpoints import read_progress
from mirrorpo.training.distributed import world_size
from mirrorpo.training.loss import LossComputer
from mirrorpo.training.run import train
from mirrorpo.training.scoring import gather_ids
from mirrorpo.training.setup import Prepared, build_trainer, to_dataset
from mirrorpo.training.trainer import MirrorTrainer

LEARNED_MAP_FILE = "learned_map.json"
HISTORY_FILE = "learning.jsonl"
PICTURE_FILE = "learning.png"
# Probabilities at which the history keeps the pull against a reference of ANCHOR.
GRID = tuple(10.0 ** (-4.0 + 0.25 * i) for i in range(17))
ANCHOR = 0.1
_OPTIMISERS = ("adamw_torch", "adamw_torch_fused", "sgd")
# Log-ratios that two float32 evaluations of one policy show.
_ROUNDING = 1e-5
# What TRL keeps of a batch for its logs, and ours: the validation batch leaves no trace in it.
_KEPT = ("_rewards_per_func", "_rows", "_flat", "_metrics", "beta", "policy_objective")


class LearningTrainer(MirrorTrainer):
    """A ``MirrorTrainer`` whose penalty moves along the validation reward's gradient.

    Takes what ``MirrorTrainer`` takes, and

    Args:
        learning: the settings.
        start: the first values of what is learned.
        validation: rows of the data set's form, none of which is trained on.

    Raises:
        InputError: weights that are not float32 or float64, several processes, or generation outside of this process.
    """

    def __init__(self, *args: Any, learning: LearnSpec, start: Sequence[float], validation: Any, **kwargs: Any) -> None:
        self.learning, self.validation = learning, validation
        self.variable = Variable(what=learning.what, values=torch.tensor(start, dtype=torch.float64))
        self.coefficient = 0.0
        self.window: list[Tensor] = []
        self.scale = 0.0
        self.outer = 0
        self.history: list[dict[str, Any]] = []
        self.by_token = torch.zeros(3, 0, dtype=torch.float64)
        self._held: list[tuple[dict[str, Any], Tensor, Tensor, Tensor]] = []
        self._centre: list[Tensor] = []
        self._norm = 0.0
        self._scored: tuple[Tensor, Tensor] | None = None
        super().__init__(*args, **kwargs)
        self.coefficient = self.policy_objective.penalties[0].coefficient
        bad = {p.dtype for p in self.trained()} - {torch.float32, torch.float64}
        if bad:
            raise InputError(
                f"model.dtype: must be float32: differences of log-probabilities are taken, got {bad.pop()}"
            )
        if self.accelerator.num_processes > 1 or self.use_vllm:
            raise InputError("mirrorpo learn runs in one process and generates in it: set train.use_vllm to false")
        optim = OptimizerNames(self.args.optim).value
        if optim not in _OPTIMISERS or self.args.optim_args:
            raise InputError(
                f"train.trl.optim: must be one of {', '.join(_OPTIMISERS)} without optim_args, whose step is known "
                f"here, got {optim}"
            )
        vocabulary = self.loss_computer.scorer.vocabulary(self.model)
        self.by_token = torch.zeros(3, vocabulary, dtype=torch.float64)  # times seen, kappa, leash
        self.add_callback(_OuterStep(self))

    def trained(self) -> list[Tensor]:
        """The parameters that training moves."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def due(self) -> bool:
        """Whether the optimiser step that is being made is followed by an outer step."""
        return (self.state.global_step + 1) % self.learning.every == 0

    # What the inner step is made of

    def _record(self, output: Any, scored: Any, old: Tensor | None, mask: Tensor, mode: str) -> None:
        super()._record(output, scored, old, mask, mode)
        if mode == "train":
            self._scored = (scored.logp.detach(), mask)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.model.training and self.due():
            assert self._scored is not None
            logp, mask = self._scored
            weight = self.loss_computer.token_weights(inputs, mask, self._moment(True))
            self._held.append((inputs, logp, mask, weight))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._norm = 0.0 if norm is None else float(norm)
        return norm

    def before_step(self) -> None:
        """Keeps the parameters that the inner step leaves."""
        if self.due():
            self._centre = [p.detach().clone() for p in self.trained()]

    # The outer step

    def after_step(self) -> None:
        """The hypergradient of the step that was made, and the outer step."""
        held, self._held = self._held, []
        if not self.due() or not held:
            return
        penalty = self.policy_objective.penalties[0]
        gradient, reward = self.validation_gradient()
        limit = self.args.max_grad_norm
        clip = min(1.0, limit / (self._norm + 1e-6)) if limit else 1.0
        direction = preconditioned(self.optimizer, self.trained(), gradient, clip)
        tokens = self.tokens_of(held, direction)
        found = hypergradient(self.variable, penalty.divergence, self.coefficient, tokens)
        self.window = [*self.window, found][-self.learning.window :]
        self._observe(tokens, tokens.leash(penalty.divergence, self.coefficient))
        row = {"step": self.state.global_step + 1, "outer": self.outer, "validation_reward": reward}
        mean, size = torch.stack(self.window).mean(0).norm().item(), size_of(torch.stack(self.window))
        row |= {"hypergradient": found.norm().item(), "agreement": mean / size if size else 0.0}
        self.variable, self.scale = self.variable.moved(
            self.window, self.learning.step_rule, self.learning.rate, self.scale
        )
        self.adopt_variable()
        self.outer += 1
        self.history.append({**row, **self.now()})

    def validation_gradient(self) -> tuple[list[Tensor], float]:
        """The gradient of the expected reward on validation prompts at the policy's parameters, and the mean reward.

        Policy gradient with leave-one-out advantages on completions that the policy draws now: one forward and one
        backward pass over them.
        """
        spec, parameters = self.learning, self.trained()
        first = self.outer * spec.prompts
        rows = [self.validation[(first + i) % len(self.validation)] for i in range(spec.prompts)]
        with self._aside(spec.seed * 1_000_003 + self.outer):
            batch = self._generate_and_score_completions([row for row in rows for _ in range(spec.group_size)])
            rewards = self._rewards_per_func
            assert rewards is not None
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
            batch["advantages"] = group_advantages(total, spec.group_size, "rloo").nan_to_num()
            size = self.args.per_device_train_batch_size
            computer = LossComputer(
                objective_from({"preset": "dr_grpo", "region": "none", "aggregation": "sequence_sum"}),
                self.loss_computer.scorer,
                self.loss_computer.settings,
                self.nonfinite,
                self.get_high_entropy_mask,
            )
            moment = replace(self._moment(True), accumulation=1, with_share=False)
            total_rows, sums = len(total), [torch.zeros_like(p) for p in parameters]
            for at in range(0, total_rows, size):
                part = {
                    key: value[at : at + size] if isinstance(value, Tensor) and value.dim() else value
                    for key, value in batch.items()
                    if key != "old_per_token_logps"
                }
                share = len(part["advantages"]) / total_rows
                loss = computer(self.model, part, moment).loss * -share
                for into, slope in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                    if slope is not None:
                        into += slope
        return sums, total.mean().item()

    @contextmanager
    def _aside(self, seed: int) -> Iterator[None]:
        """A batch that is no part of the training: its draws, sums and logs are put back."""
        kept = {name: getattr(self, name) for name in _KEPT}
        logs = {name: part.copy() for name, part in self._logs.items() if hasattr(part, "copy")}
        seen = self.state.num_input_tokens_seen
        self._metrics = {mode: type(part)(part.default_factory) for mode, part in self._metrics.items()}  # pyright: ignore
        self.beta = 0.0  # the reference is not read: the validation reward has no penalty
        self.policy_objective = replace(self.policy_objective, penalties=())
        sizes = self.num_generations
        self.num_generations = self.learning.group_size
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)
            self._logs.update(logs)
            self.state.num_input_tokens_seen, self.num_generations = seen, sizes

    def tokens_of(self, held: Sequence[tuple[dict[str, Any], Tensor, Tensor, Tensor]], direction: Any) -> Tokens:
        """The inner step's tokens with their kappa: two forward passes over them."""

        def scores() -> Tensor:
            size = self.args.per_device_train_batch_size
            found = [
                self._get_per_token_logps_and_entropies(self.model, *gather_ids(inputs), batch_size=size)[0][
                    mask.bool()
                ]
                for inputs, _, mask, _ in held
            ]
            return torch.cat(found)

        kappa = change_along(scores, self.trained(), self._centre, direction)
        parts = []
        for inputs, logp, mask, weight in held:
            keep = mask.bool()
            old = inputs.get("old_per_token_logps")
            ratio = torch.ones_like(logp) if old is None else (logp - old).exp()
            columns = (logp, inputs["ref_per_token_logps"], weight * ratio, inputs["completion_ids"])
            parts.append([column[keep].detach().cpu() for column in columns])
        logp, reference, weight, ids = (torch.cat(column) for column in zip(*parts, strict=True))
        # Before the policy has left its reference, what they differ by is rounding, and says nothing about the map.
        reference = torch.where((logp - reference).abs() <= _ROUNDING, logp, reference)
        return Tokens(
            logp=logp.double(), logp_ref=reference.double(), weight=weight.double(), kappa=kappa.cpu(), ids=ids
        )

    def adopt_variable(self) -> None:
        """Puts what is learned into the objective."""
        penalty, divergence = self.policy_objective.penalties[0], self.variable.divergence()
        if divergence is None:
            self.coefficient = self.variable.values.item()
            moved = replace(penalty, coefficient=self.coefficient)
        else:
            moved = replace(penalty, divergence=divergence)
        self.policy_objective = replace(self.policy_objective, penalties=(moved,))
        self.loss_computer = self._loss_computer()

    def _observe(self, tokens: Tokens, leash: Tensor) -> None:
        for row, values in zip(self.by_token, (torch.ones_like(leash), tokens.kappa, leash), strict=True):
            row.index_add_(0, tokens.ids, values)

    def now(self) -> dict[str, Any]:
        """What the history says of the variable: its value, or the pull of the divergence on a grid."""
        penalty = self.policy_objective.penalties[0]
        logs = torch.tensor(GRID, dtype=torch.float64).log()
        pull = self.coefficient * score(penalty.divergence, logs, torch.full_like(logs, ANCHOR).log())
        value = None if self.learning.what == "map" else self.variable.values.item()
        return {"value": value, "pull": pull.tolist()}

    # A resumed run

    def _progress(self) -> dict[str, Any]:
        kept = {
            "values": self.variable.values,
            "window": self.window,
            "scale": self.scale,
            "outer": self.outer,
            "history": self.history,
            "by_token": self.by_token,
        }
        return {**super()._progress(), "learning": kept}

    def _take_up(self, kept: dict[str, Any]) -> None:
        super()._take_up(kept)
        self._take_up_learning(kept["learning"])

    def _take_up_learning(self, kept: dict[str, Any]) -> None:
        self.variable = replace(self.variable, values=kept["values"].cpu())
        self.window, self.scale = [g.cpu() for g in kept["window"]], kept["scale"]
        self.outer, self.history, self.by_token = kept["outer"], list(kept["history"]), kept["by_token"].cpu()
        if self.outer:
            self.adopt_variable()

    def load_weights(self, checkpoint: Path) -> None:
        super().load_weights(checkpoint)
        kept = read_progress(checkpoint, self.accelerator.process_index, self.args.device)
        if kept is not None:
            self._take_up_learning(kept["learning"])


class _OuterStep(TrainerCallback):
    """The seams around an optimiser step."""

    def __init__(self, trainer: LearningTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()


class Learning:
    """What ``mirrorpo learn`` adds to a training.

    Args:
        recipe: the settings.
        command: how it was started, for the record.
    """

    def __init__(self, recipe: LearnRecipe, command: str) -> None:
        self.recipe, self.command = recipe, command
        self.validation: Sequence[Row] = ()

    def prepared(self, prepared: Prepared) -> Prepared:
        """Takes the validation rows out of the training rows."""
        if world_size() > 1:
            raise InputError(f"mirrorpo learn runs in one process, got {world_size()}")
        rows, self.validation = held_out(
            prepared, self.recipe.learning.validation_problems, "learning.validation_problems"
        )
        return replace(prepared, train_rows=rows)

    def trainer(self, prepared: Prepared, folder: Path, callbacks: list[Any]) -> MirrorTrainer:
        """A ``LearningTrainer``."""
        validation = to_dataset(replace(prepared, train_rows=self.validation))
        kind = partial(LearningTrainer, learning=self.recipe.learning, start=self.recipe.start(), validation=validation)
        return build_trainer(prepared, folder, callbacks, kind)

    def finish(self, trainer: MirrorTrainer, folder: RunFolder, summary: dict[str, Any]) -> None:
        """Writes the map, the history and the picture."""
        assert isinstance(trainer, LearningTrainer)
        learned: dict[str, Any] = {
            "what": self.recipe.learning.what,
            "outer_steps": trainer.outer,
            "first_validation_reward": trainer.history[0]["validation_reward"] if trainer.history else None,
            "last_validation_reward": trainer.history[-1]["validation_reward"] if trainer.history else None,
        }
        values = trainer.variable.values
        if self.recipe.learning.what == "map":
            about = {
                "command": self.command,
                "seed": self.recipe.learning.seed,
                "start": trainer_start(self.recipe).origin,
                "outer_steps": trainer.outer,
                "recipe": self.recipe.model_dump(mode="json"),
                "mirrorpo_version": version("mirrorpo"),
            }
            found = MirrorMap(values, f"learned in {trainer.outer} outer steps")
            write_text_atomic(folder.path / LEARNED_MAP_FILE, map_text(found, about))
        else:
            learned |= {"first": self.recipe.start()[0], "last": values.item()}
        summary["learned"] = learned
        write_text_atomic(folder.path / HISTORY_FILE, "".join(json.dumps(row) + "\n" for row in trainer.history))
        if trainer.history:
            from mirrorpo.reports.curve import draw_learning

            tokenizer: Any = trainer.processing_class
            names = [tokenizer.decode([i]) for i in range(trainer.by_token.shape[1])]
            names = [tokenizer.convert_ids_to_tokens(i) if "\ufffd" in name else name for i, name in enumerate(names)]
            draw_learning(folder.path / PICTURE_FILE, trainer.history, GRID, ANCHOR, trainer.by_token, names)


def trainer_start(recipe: LearnRecipe) -> MirrorMap:
    """The map that the learning starts from."""
    return recipe.objective.build().penalties[0].divergence.map  # pyright: ignore[reportAttributeAccessIssue]


def learn(recipe: LearnRecipe, out: Path, *, resume: bool, console: Console, command: str) -> dict[str, Any]:
    """A training that learns its penalty; arguments and errors as in ``train``."""
    return train(recipe, out, resume=resume, console=console, command=command, extension=Learning(recipe, command))


def sentences(summary: dict[str, Any], out: Path) -> str:
    """The result for people."""
    learned, lines = summary["learned"], []
    if summary["accuracy_after"] is not None:
        lines.append(
            f"accuracy {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f} on {summary['problems']} "
            "unseen problems"
        )
    if learned["what"] == "map":
        lines.append(f"{learned['outer_steps']} outer steps; map: {out / LEARNED_MAP_FILE}")
    else:
        lines.append(
            f"{learned['outer_steps']} outer steps; {learned['what']} {learned['first']:.4g} -> {learned['last']:.4g}"
        )
    lines.append(f"picture: {out / PICTURE_FILE}; report: {out / 'report.html'}")
    return "\n".join(lines)


__all__ = ["HISTORY_FILE", "LEARNED_MAP_FILE", "PICTURE_FILE", "Learning", "LearningTrainer", "learn", "sentences"]
