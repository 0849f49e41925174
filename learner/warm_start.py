"""The demo's model: a tiny Qwen3 and its tokenizer, made here and warm-started on the chain task.

    python -m learner.warm_start --output runs/models/demo

The model first learns the task from right solutions, then briefly from solutions with random slips, each
carried on as if it were right. It ends up knowing the arithmetic and yet slipping on about one step in five:
sampled plainly it almost never finishes a chain of 24 without an error, and where it slips its own
probability is low. That is the long-horizon, sparse-reward case that erasable sampling is for.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from common.seeds import derive_seed
from learner.environments.tasks.chain import ChainProblem, apply_operation, generate

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
# More embedding rows than tokens: the rows above the tokenizer's length are the segment monitor's sentinels.
VOCABULARY_ROWS = 320
MAX_POSITIONS = 512
SETTINGS_FILE = "warm_start.json"
MEASURED_PROBLEMS = 128
LOCK_SECONDS = 3600.0
# Training pushes the log-probability of all reserved rows together below this.
RESERVED_LOG_MASS = -14.0
RESERVED_WEIGHT = 0.02

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


@dataclass(frozen=True, slots=True)
class WarmStartSettings:
    """Everything that decides the model: two runs with equal settings make the same model on one machine."""

    seed: int = 0
    chain_length: int = 24
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 192
    rope_theta: float = 1000.0
    initializer_range: float = 0.08
    sequences_per_step: int = 32
    clean_steps: int = 260
    slip_steps: int = 100
    slip_rate: float = 0.25
    matrix_learning_rate: float = 0.02
    other_learning_rate: float = 4e-3
    warmup_steps: int = 20
    cooldown_share: float = 0.4


@dataclass(frozen=True, slots=True)
class WarmStartMeasures:
    """What the finished model does on held-out problems, measured without sampling.

    `clean_step_accuracy`: share of result digits that were right (arg-max, given the right steps before) at
    the end of the clean phase. `step_accuracy`: the same for the finished model. `slip_rate`: probability, at
    temperature 1, that the finished model writes something else than the right digit, given the right steps
    before it. `plain_accuracy`: mean probability of the whole right response, the expected accuracy of plain
    sampling at temperature 1. `reserved_mass`: the largest probability that any position gives to all
    reserved rows together.
    """

    clean_step_accuracy: float
    step_accuracy: float
    slip_rate: float
    plain_accuracy: float
    reserved_mass: float


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the demo's tokenizer: one token a byte, one for ``×``, end-of-sequence and padding; any text
    round-trips.

    A chat is its messages' contents, each followed by a newline, so a chat message with a chain is the
    chain's prompt.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((times, _),) = byte_level.pre_tokenize_str("×")
    vocabulary = {token: index for index, token in enumerate([*alphabet, times])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(times[0], times[1])]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(settings: WarmStartSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return the untrained model, float32, initialised from the settings' seed."""
    config = Qwen3Config(
        vocab_size=VOCABULARY_ROWS,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        initializer_range=settings.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "warm start", "initial weights"))
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def slipped_values(problem: ChainProblem, slip_rate: float, rng: random.Random) -> list[int]:
    """Return results in which each step is, with probability `slip_rate`, replaced by a uniformly random
    wrong digit.

    A slip is carried on: every later result follows from what was written before it.
    """
    values = []
    value = problem.start
    for symbol, operand in problem.operations:
        value = apply_operation(symbol, value, operand)
        if rng.random() < slip_rate:
            value = (value + rng.randrange(1, 10)) % 10
        values.append(value)
    return values


def encode(
    tokenizer: PreTrainedTokenizerFast, problems: Sequence[ChainProblem], responses: Sequence[str]
) -> tuple[Tensor, int]:
    """Return the token ids of prompts, responses and end of sequence, [problems, tokens], and the prompts'
    length.

    All problems must have the same number of steps.
    """
    texts = [f"{problem.prompt}{text}{EOS_TOKEN}" for problem, text in zip(problems, responses, strict=True)]
    prompt_tokens = len(tokenizer.encode(problems[0].prompt))
    return torch.tensor(tokenizer(texts)["input_ids"]), prompt_tokens


def response_logits(model: Qwen3ForCausalLM, tokens: Tensor, prompt_tokens: int) -> Tensor:
    """Return the logits that predict the response's tokens, [problems, response tokens, vocabulary]."""
    hidden = model.model(tokens).last_hidden_state
    return cast(Tensor, model.lm_head(hidden[:, prompt_tokens - 1 : -1]))


class WarmStartTrainer:
    """Trains a fresh model through the clean phase and the slip phase."""

    def __init__(self, settings: WarmStartSettings) -> None:
        self.settings = settings
        self.tokenizer = build_tokenizer()
        self.model = build_model(settings, self.tokenizer)
        # Muon learns the retrieval and the arithmetic in about half the steps that AdamW alone needs.
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=settings.matrix_learning_rate, weight_decay=0.01),
            torch.optim.AdamW(others, lr=settings.other_learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self._rates = [settings.matrix_learning_rate, settings.other_learning_rate]

    def train(self, on_step: Callable[[str], None]) -> WarmStartMeasures:
        """Train both phases, calling `on_step` with the phase's name after each step; return the measures."""
        settings = self.settings
        count = settings.sequences_per_step * (settings.clean_steps + settings.slip_steps)
        problems = generate(derive_seed(settings.seed, "warm start", "problems"), "train", count, settings.chain_length)
        rng = random.Random(derive_seed(settings.seed, "warm start", "slips"))
        total = settings.clean_steps + settings.slip_steps
        clean_step_accuracy = math.nan
        for step in range(total):
            batch = problems[step * settings.sequences_per_step : (step + 1) * settings.sequences_per_step]
            clean = step < settings.clean_steps
            rate = 0.0 if clean else settings.slip_rate
            responses = [problem.response(slipped_values(problem, rate, rng)) for problem in batch]
            self._step(batch, responses, self._schedule(step, total))
            on_step("learning the task" if clean else "learning to slip")
            if step == settings.clean_steps - 1:
                clean_step_accuracy = self.measure(math.nan).step_accuracy
        return self.measure(clean_step_accuracy)

    @torch.no_grad()
    def measure(self, clean_step_accuracy: float) -> WarmStartMeasures:
        """Measure the model on held-out problems, teacher-forced on the right solutions."""
        settings = self.settings
        seed = derive_seed(settings.seed, "warm start", "measured problems")
        problems = generate(seed, "test", MEASURED_PROBLEMS, settings.chain_length)
        tokens, prompt_tokens = encode(self.tokenizer, problems, [problem.solution for problem in problems])
        log_probs = response_logits(self.model, tokens, prompt_tokens).log_softmax(-1)
        labels = tokens[:, prompt_tokens:]
        chosen = log_probs.gather(-1, labels[..., None])[..., 0]
        # The result digit is the last but one token of each line; the last token of all is the end of
        # sequence.
        line_tokens = (labels.shape[1] - 1) // settings.chain_length
        digits = slice(line_tokens - 2, None, line_tokens)
        right = log_probs.argmax(-1)[:, digits] == labels[:, digits]
        return WarmStartMeasures(
            clean_step_accuracy=clean_step_accuracy,
            step_accuracy=right.float().mean().item(),
            slip_rate=1 - chosen[:, digits].exp().mean().item(),
            plain_accuracy=chosen.sum(-1).exp().mean().item(),
            reserved_mass=log_probs[..., len(self.tokenizer) :].exp().sum(-1).max().item(),
        )

    def _step(self, problems: Sequence[ChainProblem], responses: Sequence[str], schedule: float) -> None:
        tokens, prompt_tokens = encode(self.tokenizer, problems, responses)
        logits = response_logits(self.model, tokens, prompt_tokens)
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, prompt_tokens:].flatten())
        # The segment monitor masks the reserved rows, so probability on them would set what is sampled apart
        # from the policy. Cross-entropy alone leaves up to 1e-3 there.
        reserved = logits[..., len(self.tokenizer) :].logsumexp(-1) - logits.logsumexp(-1)
        loss = loss + RESERVED_WEIGHT * functional.relu(reserved - RESERVED_LOG_MASS).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule
            optimizer.step()
        self.model.zero_grad()

    def _schedule(self, step: int, total: int) -> float:
        """Share of the full learning rate: linear warm-up, constant, linear cool-down to 0."""
        settings = self.settings
        return min(1.0, (step + 1) / settings.warmup_steps, (total - step) / (settings.cooldown_share * total))


def finished_measures(output: Path, settings: WarmStartSettings) -> WarmStartMeasures | None:
    """Return what `output` records of a finished warm start with these settings, None if there is none."""
    try:
        record: dict[str, Any] = json.loads((output / SETTINGS_FILE).read_text())
        if record["settings"] != asdict(settings):
            return None
        return WarmStartMeasures(**record["measures"])
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError, TypeError):
        return None


def chain_length_of(model: Path) -> int | None:
    """Steps of the chains that a warm-started model was made for; None if `model` is none."""
    try:
        length: int = json.loads((model / SETTINGS_FILE).read_text())["settings"]["chain_length"]
        return length
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None


def warm_start(
    output: Path,
    settings: WarmStartSettings | None = None,
    *,
    force: bool = False,
    on_step: Callable[[str], None] = lambda phase: None,
) -> WarmStartMeasures:
    """Write the warm-started model to `output`, a Hugging Face directory, and return what it does.

    Returns at once if `output` already holds a model made with these settings, unless `force`. The directory
    appears whole or not at all, and several processes may ask for it at once. Raises FileExistsError if
    `output` is anything else than an earlier warm start, and TimeoutError if another process still makes it after
    `LOCK_SECONDS`.
    """
    settings = settings or WarmStartSettings()
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_name(f".{output.name}.lock"), timeout=LOCK_SECONDS):
        finished = finished_measures(output, settings)
        if finished is not None and not force:
            return finished
        if output.exists() and not (output / SETTINGS_FILE).is_file() and not _is_empty_directory(output):
            raise FileExistsError(f"{output} exists and is no warm start (no {SETTINGS_FILE}): name another --output")
        trainer = WarmStartTrainer(settings)
        with _one_thread():
            measures = trainer.train(on_step)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            new = Path(scratch) / "new"
            trainer.model.save_pretrained(new)
            trainer.tokenizer.save_pretrained(new)
            record = {"settings": asdict(settings), "measures": asdict(measures)}
            (new / SETTINGS_FILE).write_text(json.dumps(record, indent=2) + "\n")
            # Weights are written readable by their owner only, which a server under another user cannot load.
            for file in new.iterdir():
                file.chmod(0o644)
            if output.exists():
                output.rename(Path(scratch) / "old")
            new.rename(output)
    return measures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m learner.warm_start",
        description="Make the demo's warm-started model: a Hugging Face directory with a tiny Qwen3.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--seed", type=int, default=WarmStartSettings().seed, help="seed of weights and data")
    parser.add_argument(
        "--slip-rate", type=float, default=WarmStartSettings().slip_rate, help="share of steps trained to be wrong"
    )
    parser.add_argument("--force", action="store_true", help="make it again even if DIR is up to date")
    options = parser.parse_args(arguments)
    settings = WarmStartSettings(seed=options.seed, slip_rate=options.slip_rate)
    disable_progress_bar()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("warm start", total=settings.clean_steps + settings.slip_steps)
            measures = warm_start(
                options.output,
                settings,
                force=options.force,
                on_step=lambda phase: progress.update(task, advance=1, description=phase),
            )
            progress.update(task, completed=progress.tasks[0].total, description="ready")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.output}: slips on {measures.slip_rate:.1%} of the steps; plain sampling finishes "
        f"{measures.plain_accuracy:.2%} of the chains; "
        f"before the slips {measures.clean_step_accuracy:.2%} of the steps were right"
    )
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread: more gain little on so small a model, and lose a lot where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


if __name__ == "__main__":
    sys.exit(main())
