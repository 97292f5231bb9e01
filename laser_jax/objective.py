"""What is trained: the method, the weights of its terms, the policy that is reinforced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from laser_jax.settings import require, require_in

KeyframeRule = Literal["official", "paper"]
Pooling = Literal["prompt_and_thoughts", "thoughts"]
Reward = Literal["reciprocal_rank", "ndcg", "info_nce"]


@dataclass(frozen=True)
class LossWeights:
    """L = latent L_latent + explicit L_explicit + output L_output + trajectory L_trajectory
    (LaSER equation 14; the lambdas are 1, 10 and 0.1) + teacher L_teacher."""

    latent: float = 1.0
    explicit: float = 1.0
    output: float = 10.0
    trajectory: float = 0.1
    teacher: float = 0.0
    """The weight of the rows' own `teacher_scores`."""

    def __post_init__(self) -> None:
        require_in("[0, inf)", self, "objective.weights.", *vars(self))

    @property
    def need_explicit_view(self) -> bool:
        return bool(self.explicit or self.output or self.trajectory)


def pools_prompt(pooling: Pooling) -> bool:
    """Whether the first of the K pooled states is the prompt's own, which reads the query by
    itself. Where it is not (GIRCSE), K = 1 is a thought already, and there is no explicit view: a
    reasoning read behind the query would have its own state left out."""
    return pooling == "prompt_and_thoughts"


def appended_thoughts(num_thinking_steps: int, pooling: Pooling) -> int:
    """The soft tokens that stand behind a prompt when K states are pooled."""
    return num_thinking_steps - pools_prompt(pooling)


@dataclass(frozen=True)
class PolicyConfig:
    """The thoughts of a query as a policy that is reinforced (docs/latent_rl.md)."""

    weight: float = 1.0
    """Of the reinforcement, beside `weights.latent` of the contrastive loss of what was drawn."""
    rollouts: int = 8
    """R, the drawn trajectories of each query, which are compared with one another."""
    draws: int = 1
    """Tokens drawn for a thought, whose embeddings' mean is fed on. 1 is a discrete token; with
    more and more it becomes the soft token of inference."""
    temperature: float = 1.0
    """Divides the logits that tokens are drawn from."""
    reward: Reward = "reciprocal_rank"
    """Of a rollout: 1 / rank of its positive in the pool, 1 / log2(1 + rank), or minus its
    contrastive loss."""
    kl: float = 0.0
    """The weight of KL(policy || that of the backbone without adapters)."""
    clip: float = 0.2
    """How far from 1 the ratio of a thought's probability to its old one still pays."""
    updates: int = 1
    """Of the parameters, on the same draws, in an optimizer step."""

    def __post_init__(self) -> None:
        prefix = "objective.policy."
        require_in("[2, inf)", self, prefix, "rollouts")
        require_in("[1, inf)", self, prefix, "draws", "updates")
        require_in("(0, inf)", self, prefix, "temperature", "clip")
        require_in("[0, inf)", self, prefix, "weight", "kl")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is trained. The defaults are the paper's; `configs/official.yaml` holds the code's."""

    method: Literal["laser", "gircse", "latent_rl"] = "laser"
    num_thinking_steps: int = 3
    """K, the number of hidden states that are pooled. 1 is a last-token retriever."""
    document_thinking_steps: int | None = None
    """K of documents. None: the queries'. At 1 they cost as much as a plain retriever's."""
    weights: LossWeights = field(default_factory=LossWeights)
    temperature: float = 0.02
    output_temperature: float = 0.02
    trajectory_temperature: float = 0.02
    """The paper states 0.02, the released code uses 0.05."""
    teacher_temperature: float = 1.0
    """Divides `teacher_scores`, as `temperature` does the student's beside them."""
    keyframes: KeyframeRule = "paper"
    distillation_warmup_steps: int = 0
    """The output and trajectory weights grow linearly from 0 over this many steps."""
    dimensions: tuple[int, ...] = ()
    """Matryoshka (arXiv 2205.13147): every term of the loss is also taken of the first so many."""
    dimension_weights: tuple[float, ...] = ()
    """Weights of the losses at `dimensions`, beside 1 for the full width's. Empty: 1 each."""
    views: Literal["auto", "fast", "parity"] = "auto"
    """`fast` reads query and reasoning in one pass, and queries and documents think as one batch;
    `parity` makes a pass for each. `auto` is `fast` where that is the same (`Config.views`)."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Of `method: latent_rl`."""
    teacher: str | None = None
    """A directory of a trained model that stays frozen and replaces the shared teacher (the
    ablation without co-learning). None: the same weights teach and learn."""

    def __post_init__(self) -> None:
        steps = ("num_thinking_steps", "document_thinking_steps")
        require_in("[1, inf)", self, "objective.", *steps, "dimensions")
        temperatures = (n for n in vars(self) if n.endswith("temperature"))
        require_in("(0, inf)", self, "objective.", *temperatures)
        require_in("[0, inf)", self, "objective.", "distillation_warmup_steps", "dimension_weights")
        of_laser = ("document_thinking_steps", "weights.teacher", "teacher")
        given = (self.document_thinking_steps, self.weights.teacher, self.teacher)
        fault = f"objective: {', '.join(of_laser)} want method: laser"
        require(self.method != "gircse" or not any(given), fault)
        if self.method == "latent_rl":
            self._require_what_a_policy_reads()
        else:
            unset = self.policy == PolicyConfig()
            require(unset, "objective.policy wants objective.method: latent_rl")
            taught = bool(self.weights.output or self.weights.trajectory) or self.teacher is None
            require(taught, "objective.teacher teaches by weights.output and .trajectory, both 0")
        weights, sizes = len(self.dimension_weights), len(self.dimensions)
        fault = f"objective has {weights} dimension_weights for {sizes} dimensions: give one each"
        require(weights in (0, sizes), fault)

    def _require_what_a_policy_reads(self) -> None:
        require(
            self.num_thinking_steps > 1,
            "objective.method: latent_rl wants objective.num_thinking_steps of at least 2: the "
            "first state is the prompt's own, and nothing is drawn for it",
        )
        unread = {name: getattr(self, name) for name in ("dimensions", "teacher")}
        for name in ("explicit", "output", "trajectory", "teacher"):
            unread[f"weights.{name}"] = getattr(self.weights, name)
        given = [f"objective.{name} ({value})" for name, value in unread.items() if value]
        require(
            not given,
            "objective.method: latent_rl reads neither a reasoning nor another teacher, and trains "
            f"one size; set to 0, null or []: {', '.join(given)}",
        )

    @property
    def pooling(self) -> Pooling:
        return "thoughts" if self.method == "gircse" else "prompt_and_thoughts"

    @property
    def need_explicit_view(self) -> bool:
        return self.method == "laser" and self.weights.need_explicit_view

    @property
    def need_teacher_scores(self) -> bool:
        return self.weights.teacher > 0
