"""Groups of a recipe's keys that more than training reads: how vLLM generates, how a policy is evaluated."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Part(BaseModel):
    """A frozen group of keys that knows no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class VllmSpec(Part):
    """How vLLM generates."""

    mode: Literal["colocate", "server"] = Field(default="colocate", description="in this process, or `trl vllm-serve`")
    memory_share: float = Field(default=0.3, gt=0.0, lt=1.0, description="of the device's memory (colocate)")
    sleep: bool = Field(default=False, description="give its memory back during the update (colocate)")
    server_url: str | None = Field(default=None, min_length=1, description="such as http://localhost:8000 (server)")
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        default="sequence_mask",
        description="weight of the policy term for the sampler's mismatch: trainer / sampler probability, held or 0",
    )
    ratio_max: float = Field(default=3.0, gt=0.0, description="largest weight of the correction")
    ratio_min: float | None = Field(default=None, ge=0.0, description="smallest one; empty: no bound")

    @model_validator(mode="after")
    def _of_its_mode(self) -> VllmSpec:
        if (self.mode == "server") != (self.server_url is not None):
            raise ValueError("server_url goes with mode 'server', and only with it")
        if self.mode == "server" and (self.sleep or self.memory_share != 0.3):
            raise ValueError(
                "memory_share and sleep have no effect with mode 'server': the server has its own settings"
            )
        if self.correction == "none" and (self.ratio_max, self.ratio_min) != (3.0, None):
            raise ValueError("ratio_max and ratio_min have no effect with correction 'none'")
        if self.ratio_min is not None and self.ratio_min > self.ratio_max:
            raise ValueError(f"ratio_min must be at most ratio_max, {self.ratio_max:g}, got {self.ratio_min:g}")
        return self


class EvalSpec(Part):
    """The evaluation before and after."""

    problems: int = Field(default=512, ge=0, description="unseen problems; 0: no evaluation")
    samples: int = Field(default=1, ge=1, le=100_000, description="completions per problem")
    temperature: float = Field(default=1.0, ge=0.0, le=10.0, description="0: greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_completion_length: int | None = Field(default=None, ge=1, le=1_000_000, description="empty: as in training")
    batch_size: int = Field(default=256, ge=1, le=1_000_000, description="completions generated at once")
    seed: int = Field(default=1234, ge=0, le=2**31 - 1)

    @model_validator(mode="after")
    def _differ(self) -> EvalSpec:
        if self.temperature == 0.0 and self.samples > 1:
            raise ValueError(
                f"samples must be 1 with temperature 0 (greedy: all would be the same), got {self.samples}"
            )
        return self
