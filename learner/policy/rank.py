"""One DeepSpeed rank of the learner, as a Ray actor. `LearnerGroup` drives it; all ranks get the same calls.

Run with DeepSpeed 0.19.8. `LearnerGroup` sets `DS_ACCELERATOR` before this is imported, since transformers imports
DeepSpeed, which picks its accelerator at once.
"""

import json
import math
import os
import resource
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from common.config.run import RunConfig
from common.packed import TokenArrays
from common.weights.updates import WeightUpdate
from common.weights.weight_file import ParameterShape, WrittenWeights
from learner.objectives import MinibatchTotals, ObjectiveInputs, ObjectiveStatistics, compute_objective
from learner.policy.batching import MicroBatch, RankBatch, collate, with_tokens
from learner.policy.model import learning_rate, load_policy, response_logprobs
from learner.policy.samples import TrainingSample
from learner.weights.publisher import Parameters, Publisher
from learner.weights.transports import publisher

CHECKPOINT_TAG = "deepspeed"
CHECKPOINT_DESCRIPTION = "learner.json"
_DEEPSPEED_TYPES = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a rank runs, and a port that was free there."""

    node: str
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class MinibatchResult:
    """What one rank reports of one optimizer step. `loss`: its share; the ranks' shares add up.

    `peak_bytes`: of memory since it began. On a GPU its tensors', on CPUs the whole process's.
    """

    loss: float
    statistics: ObjectiveStatistics
    gradient_norm: float
    learning_rate: float
    peak_bytes: int


class NotFiniteError(RuntimeError):
    """A loss or a gradient is infinite or no number: what is trained from there on is lost."""


class LearnerRank:
    """A rank: its part of the model and optimizer. Methods are collective unless they say otherwise."""

    def __init__(self, config: RunConfig, rank: int, log_directory: str) -> None:
        _redirect_output(Path(log_directory) / f"learner-rank{rank}.log")
        self._config = config
        self._rank = rank
        self._world_size = config.learner.ranks
        self._stage = config.learner.zero_stage
        self._engine: Any = None
        self._reference: nn.Module | None = None
        self._publisher: Publisher | None = None

    def place(self) -> Placement:
        """This rank's node, and a free port on it. Not collective."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = int(free.getsockname()[1])
        return Placement(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port)

    def start(self, environment: Mapping[str, str]) -> None:
        """Join the process group that `environment` describes and load the model. Raises PolicyError."""
        os.environ.update(environment)
        torch.set_num_threads(self._config.learner.threads_per_rank)
        model = load_policy(self._config.model)
        import deepspeed
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator

        # Without this DeepSpeed compiles a C++ extension for two minutes when a process group of gloo begins.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="gloo" if get_accelerator().device_name() == "cpu" else "nccl",
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=self._config.learner.step_seconds),
        )
        if self._config.learner.gradient_checkpointing:
            enable: Any = model.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(
                model.parameters(),
                lr=self._config.learner.optimizer.learning_rate,
                **self._optimizer_settings(),
            ),
            config=self._deepspeed_config(model),
            dist_init_required=False,
        )
        self._engine.train()
        if self._config.learner.objective.kl_coefficient > 0.0:
            self._reference = load_policy(self._config.model).eval().requires_grad_(False).to(self._device)
        elements = sum(math.prod(shape.shape) for shape in self._parameters().shapes)
        print(
            f"learner rank {self._rank} of {self._world_size}: {elements:,} parameters in "
            f"{self._config.model.dtype}, ZeRO stage {self._stage}, on {self._device}"
        )

    def train(self, batches: list[RankBatch]) -> list[MinibatchResult]:
        """One optimizer step for each minibatch, of which this rank gets its micro-batches."""
        results = []
        batches = with_tokens(batches, self._fetch)
        old_logprobs = self._old_logprobs(batches)
        for number, (batch, old) in enumerate(zip(batches, old_logprobs, strict=True), start=1):
            try:
                results.append(self._train_minibatch(batch, old))
            except NotFiniteError as error:
                raise NotFiniteError(f"minibatch {number} of {len(batches)}: {error}") from None
        return results

    def _fetch(self, references: list[Any]) -> list[TokenArrays]:
        """What the references lead to, from wherever the responses were generated: views of shared memory."""
        found: list[TokenArrays] = ray.get(references, timeout=self._config.learner.step_seconds)
        return found

    def begin_publishing(self, version: int) -> WeightUpdate | None:
        """Rank 0 makes ready to publish the current parameters, see `Publisher.begin`. Not collective."""
        if self._rank != 0:
            return None
        if self._publisher is None:
            replicas = self._config.rollout.engine.replicas
            self._publisher = publisher(self._config.sync, replicas, ray.util.get_node_ip_address())
        return self._publisher.begin(version, self._parameters())

    def publish(self, version: int) -> WrittenWeights | None:
        """Rank 0 sends the parameters and returns what it sent; the others return None."""
        parameters = self._parameters()
        written = None
        if self._publisher is not None:
            written = self._publisher.publish(version, parameters)
        elif self._stage == 3:
            for _ in parameters:
                pass
        self._barrier()
        return written

    def keep_only(self, version: int) -> None:
        """Every replica holds `version`. Not collective."""
        if self._publisher is not None:
            self._publisher.keep_only(version)

    def discard(self, version: int) -> None:
        """Nobody is to load `version`. Not collective."""
        if self._publisher is not None:
            self._publisher.discard(version)

    def stop_publishing(self) -> None:
        """Leave nothing behind. Not collective."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def save_checkpoint(self, directory: str) -> None:
        """Write model, optimizer and step count into `directory`, which exists."""
        self._engine.save_checkpoint(directory, tag=CHECKPOINT_TAG, save_latest=False)
        if self._rank == 0:
            description = {
                "ranks": self._world_size,
                "zero_stage": self._stage,
                "dtype": self._config.model.dtype,
                "optimizer_steps": self._engine.global_steps,
            }
            (Path(directory) / CHECKPOINT_DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        self._barrier()

    def load_checkpoint(self, directory: str) -> None:
        """Continue from what `save_checkpoint` wrote, with the same ranks and ZeRO stage."""
        path, _ = self._engine.load_checkpoint(directory, tag=CHECKPOINT_TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load the checkpoint in {directory}")
        # It brings the optimizer's settings back, too; those of the configuration may be others.
        settings = self._optimizer_settings()
        for group in self._engine.optimizer.param_groups:
            group.update(settings)

    def export_huggingface(self, directory: str) -> None:
        """Rank 0 writes model, generation config and tokenizer as `save_pretrained` does."""
        if self._rank == 0:
            state = {shape.name: tensor.detach().cpu().clone() for shape, tensor in self._parameters()}
            self._engine.module.save_pretrained(directory, state_dict=state)
            model = self._config.model
            tokenizer = AutoTokenizer.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
            tokenizer.save_pretrained(directory)
        elif self._stage == 3:
            for _ in self._parameters():
                pass
        self._barrier()

    @property
    def _device(self) -> torch.device:
        return torch.device(self._engine.device)

    def _old_logprobs(self, batches: list[RankBatch]) -> list[list[Tensor | None]]:
        """Log-probs of the policy as it is now, for every micro-batch of every minibatch.

        None where they need no forward pass of their own: if behaviour's are used, and in the first minibatch, whose
        own forward pass gives them.
        """
        first, later = batches[:1], batches[1:]
        found: list[list[Tensor | None]] = [[None] * len(batch.microbatches) for batch in first]
        if self._config.learner.old_logprobs == "behaviour":
            return found + [[None] * len(batch.microbatches) for batch in later]
        with torch.no_grad():
            for batch in later:
                microbatches = (collate(samples).to(self._device) for samples in batch.microbatches)
                found.append([response_logprobs(self._engine, microbatch) for microbatch in microbatches])
        return found

    def _train_minibatch(self, batch: RankBatch, old_logprobs: list[Tensor | None]) -> MinibatchResult:
        rate = self._set_learning_rate()
        total = ObjectiveStatistics()
        loss_sum = 0.0
        last = len(batch.microbatches) - 1
        for index, (samples, old) in enumerate(zip(batch.microbatches, old_logprobs, strict=True)):
            self._engine.set_gradient_accumulation_boundary(index == last)
            loss, statistics = self._loss(samples, batch.totals, old)
            # DeepSpeed averages gradients over the ranks; the loss is a share of the minibatch's sum.
            self._engine.backward(loss * self._world_size)
            loss_sum += float(loss.detach())
            total.add(statistics)
        ratios = f"importance ratios from {total.ratio_min:.3g} to {total.ratio_max:.3g}"
        if not math.isfinite(loss_sum):
            raise NotFiniteError(f"the loss is {loss_sum}, on learner rank {self._rank}, with {ratios}")
        norm = self._unclipped_norm()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm()) if norm is None else norm
        # DeepSpeed says -1 where it found an overflow.
        if not math.isfinite(norm) or norm < 0.0:
            raise NotFiniteError(f"the gradient's norm is {norm} with a loss of {loss_sum:.3g} and {ratios}")
        return MinibatchResult(loss_sum, total, norm, rate, self._peak_bytes())

    def _peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _loss(
        self, samples: list[TrainingSample], totals: MinibatchTotals, old_logprobs: Tensor | None
    ) -> tuple[Tensor, ObjectiveStatistics]:
        learner = self._config.learner
        batch = collate(samples).to(self._device)
        logprobs = response_logprobs(self._engine, batch)
        if learner.old_logprobs == "recomputed" and old_logprobs is None:
            old_logprobs = logprobs.detach()
        inputs = ObjectiveInputs(
            logprobs,
            batch.behaviour_logprobs,
            batch.advantages,
            batch.mask,
            self._reference_logprobs(batch),
            old_logprobs,
        )
        return compute_objective(learner.objective, inputs, totals, learner.importance_sampling)

    def _reference_logprobs(self, batch: MicroBatch) -> Tensor | None:
        if self._reference is None:
            return None
        with torch.no_grad():
            return response_logprobs(self._reference, batch)

    def _optimizer_settings(self) -> dict[str, Any]:
        optimizer = self._config.learner.optimizer
        return {"betas": optimizer.betas, "eps": optimizer.epsilon, "weight_decay": optimizer.weight_decay}

    def _set_learning_rate(self) -> float:
        total = self._config.steps * self._config.learner.minibatches_per_step
        rate = learning_rate(self._config.learner.optimizer, self._engine.global_steps, total)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _unclipped_norm(self) -> float | None:
        """The gradient's norm where DeepSpeed does not keep it: in float32 without ZeRO. Else None."""
        if self._stage > 0 or self._config.model.dtype != "float32":
            return None
        norms = [p.grad.norm() for p in self._engine.module.parameters() if p.grad is not None]
        return float(torch.stack(norms).norm())

    def _parameters(self) -> Parameters:
        # named_parameters() names a tied head once, as the embedding: transformers and vLLM tie it again.
        shapes = [
            ParameterShape(name, tuple(getattr(p, "ds_shape", p.shape)), p.dtype)
            for name, p in self._engine.module.named_parameters()
        ]
        return Parameters(shapes, self._gathered)

    @contextmanager
    def _gathered(self, name: str) -> Iterator[Tensor]:
        import deepspeed

        parameter = self._engine.module.get_parameter(name)
        with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
            yield parameter

    def _barrier(self) -> None:
        import deepspeed

        deepspeed.comm.barrier()

    def _deepspeed_config(self, model: nn.Module) -> dict[str, Any]:
        """Micro-batches are counted by `_train_minibatch`, so DeepSpeed's own sizes are all 1."""
        settings: Any = getattr(model, "config", None)
        accumulated = _DEEPSPEED_TYPES[self._config.learner.grad_accum_dtype]
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._config.learner.optimizer.max_gradient_norm,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self._config.model.dtype == "bfloat16"},
            "data_types": {"grad_accum_dtype": accumulated},
            # Else they are rounded to the model's type again on their way between the ranks, and summed in it there.
            "communication_data_type": accumulated,
            "zero_optimization": {
                "stage": self._stage,
                # Vectors stay whole on every rank, matrices are partitioned, however small the model is.
                "stage3_param_persistence_threshold": 10 * getattr(settings, "hidden_size", 1000),
            },
        }


def _redirect_output(path: Path) -> None:
    """Send all that this process prints, C++ libraries included, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
