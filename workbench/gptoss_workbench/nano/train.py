"""Train the nano model: `python -m gptoss_workbench.nano.train --preset nano --out runs/nano`.

One or more processes on one machine, one thread each; gradients are summed by all-reduce. Every step draws
its examples from a generator seeded by (seed, rank, step), so a resumed run sees what an unbroken one
would see.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from gptoss_workbench.nano import corpus, render
from gptoss_workbench.nano.batching import Rows, collate
from gptoss_workbench.nano.corpus import NO_PREFIX, Example, Prefix, Stage
from gptoss_workbench.nano.tasks import TASKS, Setting
from gptoss_workbench.nano.training_model import Config, TrainingModel, WeightedLoss


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learnt. Ends after `minutes`, or after `steps` where that is set."""

    examples_per_process: int = 32
    learning_rate: float = 2e-3
    final_share: float = 0.03
    warmup_steps: int = 100
    steady_until: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    balance_weight: float = 0.005
    quantized_from: float = 0.85
    stage: Stage = field(default_factory=Stage)
    steps: int = 0
    minutes: float = 85.0
    log_every: int = 50


PRESETS: dict[str, tuple[dict[str, int], Recipe]] = {
    "nano": ({}, Recipe()),
    "smoke": (
        {"hidden_size": 64, "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
        Recipe(examples_per_process=48, steps=60, steady_until=0.9, warmup_steps=20, log_every=10),
    ),
}
CHECKPOINT = "checkpoint.pt"
CHECKPOINT_SECONDS = 180.0
EVALUATE_SECONDS = 400.0
EVALUATED = [task for task in TASKS if task != "addition"]


class Trainer:
    """One process of a run: model, flat parameters and gradients, optimiser, clock."""

    def __init__(self, config: Config, rows: Rows, recipe: Recipe, seed: int, rank: int, world: int) -> None:
        torch.manual_seed(seed)
        self.rows, self.recipe, self.seed, self.rank, self.world = rows, recipe, seed, rank, world
        self.model = TrainingModel(config)
        self.flat, self.gradient = flatten(self.model)
        self.optimizer = torch.optim.AdamW(
            [self.flat], lr=0.0, betas=recipe.betas, weight_decay=0.0, fused=True)
        self.step, self.tokens, self.elapsed, self.progress = 0, 0, 0.0, 0.0

    def learning_rate(self) -> float:
        """Warm-up, a short plateau, then a straight line down."""
        r = self.recipe
        warm = min(1.0, (self.step + 1) / r.warmup_steps)
        decay = max(0.0, (self.progress - r.steady_until) / (1 - r.steady_until))
        return r.learning_rate * warm * (1 - (1 - r.final_share) * decay)

    def train_step(self) -> dict[str, float]:
        recipe, model = self.recipe, self.model
        rng = Random(f"{self.seed}/{self.rank}/{self.step}")
        examples = corpus.draw_step(rng, recipe.examples_per_process, recipe.stage.limits(self.step))
        batch = collate(examples, self.rows, model.config.sliding_window)
        model.quantized = self.progress >= recipe.quantized_from
        hidden, balance, load = model(batch)
        learnt = (batch.weights > 0).nonzero()[:, 0]
        logits = model.logits(hidden[learnt], self.rows.unused)
        weights = batch.weights[learnt]
        loss = WeightedLoss.apply(logits, batch.targets[learnt], weights)
        self.gradient.zero_()
        (loss + recipe.balance_weight * balance).backward()
        numbers = torch.tensor([loss.item(), balance.item(), float(len(batch.rows)),
                                load.amax().item() / load[0].sum().item(),
                                load.amin().item() / load[0].sum().item()])
        if self.world > 1:
            dist.all_reduce(self.gradient)
            dist.all_reduce(numbers)
            self.gradient /= self.world
        norm = self.gradient.norm()
        self.gradient *= torch.clamp(recipe.clip / (norm + 1e-6), max=1.0)
        rate = self.learning_rate()
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.step += 1
        self.tokens += int(numbers[2])
        loss_mean, balance_mean, _, most, least = (numbers / self.world).tolist()
        return {"loss": loss_mean, "balance": balance_mean, "gradient_norm": norm.item(),
                "learning_rate": rate, "load_max": most, "load_min": least}

    def tick(self, seconds: float) -> None:
        """Advance the clock; rank 0's clock is everybody's, so that all decide alike."""
        clock = torch.tensor([self.elapsed + seconds], dtype=torch.float64)
        if self.world > 1:
            dist.broadcast(clock, 0)
        self.elapsed = clock.item()
        steps = self.recipe.steps
        self.progress = self.step / steps if steps else self.elapsed / (60 * self.recipe.minutes)

    @torch.no_grad()
    def evaluate(self, count: int) -> dict[str, float]:
        """Share of held-out completions predicted right at every token, by `task/effort`."""
        cells = evaluation_cells()
        right = torch.zeros(len(cells))
        for place, (task, effort, digits) in enumerate(cells):
            if place % self.world != self.rank:
                continue
            rng = Random(f"evaluate/{place}")
            examples = [evaluation_example(rng, task, effort, digits) for _ in range(count)]
            batch = collate(examples, self.rows, self.model.config.sliding_window)
            hidden = self.model(batch)[0]
            for start, example in zip(batch.starts, examples, strict=True):
                # Of words said twice, only the second half can be known.
                first = len(example.ids) // 2 - 1 if task == "repeat" else len(example.prompt) - 1
                span = slice(int(start) + first, int(start) + len(example.ids) - 1)
                guess = self.model.logits(hidden[span], self.rows.unused).argmax(-1)
                hits = (guess == batch.targets[span]).float()
                right[place] += hits.mean() if task == "repeat" else hits.all().float()
        if self.world > 1:
            dist.all_reduce(right)
        return {f"{task}{'' if low == 1 else low}/{effort}": value / count
                for (task, effort, (low, _)), value in zip(cells, right.tolist(), strict=True)}

    def save(self, path: Path) -> None:
        state = {"config": asdict(self.model.config), "rows": list(self.rows.ids), "seed": self.seed,
                 "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "step": self.step, "tokens": self.tokens, "elapsed": self.elapsed}
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.elapsed = state["step"], state["tokens"], state["elapsed"]


def flatten(model: TrainingModel) -> tuple[Tensor, Tensor]:
    """All parameters and gradients as views of two flat tensors: one optimiser call, one all-reduce."""
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    gradient = torch.zeros_like(flat)
    place = 0
    for parameter in parameters:
        view = slice(place, place + parameter.numel())
        parameter.data = flat[view].view_as(parameter)
        parameter.grad = gradient[view].view_as(parameter)
        place = view.stop
    flat.requires_grad_()
    flat.grad = gradient
    return flat, gradient


def evaluation_cells() -> list[tuple[str, str, tuple[int, int]]]:
    """(task, effort, (fewest, most digits)) of every cell of the table."""
    cells = [(task, effort, (1, 6)) for task in EVALUATED for effort in render.EFFORTS]
    cells += [("addition", effort, digits) for digits in ((3, 3), (4, 6)) for effort in render.EFFORTS]
    return [*cells, ("repeat", "none", (1, 6))]


def evaluation_example(rng: Random, task: str, effort: str, digits: tuple[int, int]) -> Example:
    if task == "repeat":
        words = " ".join(["", *rng.sample(corpus.REPEATABLE, 8)])
        return Example("repeat", NO_PREFIX, (), tuple(render.encode(words + words)))
    tools = ("get_weather", "get_time") if task == "tool" else ()
    prefix = Prefix(render.prefix_ids(effort, None, None, tools), effort, tools)
    fewest, most = digits
    while True:
        turn = corpus.draw_turn(rng, Setting(effort, tools, most), task, held_out=True)
        lengths = [len(word.strip("?.,")) for word in turn.user.split() if word.strip("?.,").isdigit()]
        if task != "addition" or min(lengths) >= fewest:
            return corpus.chat_example(rng, prefix, turn)


def table(cells: dict[str, float]) -> str:
    """One line a task, one column an effort."""
    tasks = dict.fromkeys(name.split("/")[0] for name in cells)
    return "\n".join(
        f"{task:12s}" + "".join(f" {effort}:{cells[name]:.2f}" for effort in (*render.EFFORTS, "none")
                                if (name := f"{task}/{effort}") in cells)
        for task in tasks
    )


def start(rank: int, world: int, options: argparse.Namespace) -> Trainer:
    """Set torch up for this process, join the others, and take up the run where it stands."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # What is never read before it is written need not be filled, which costs a tenth of a step.
    switches: Any = torch.utils.deterministic
    switches.fill_uninitialized_memory = False
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(options.port))
        dist.init_process_group("gloo", rank=rank, world_size=world)
    out = Path(options.out)
    sizes, recipe = PRESETS[options.preset]
    if options.minutes:
        recipe = replace(recipe, minutes=options.minutes, steps=0)
    if options.steps:
        recipe = replace(recipe, steps=options.steps)
    rows = Rows(tuple(json.loads((out / "rows.json").read_text())))
    trainer = Trainer(Config(rows=len(rows.ids) + 1, **sizes), rows, recipe, options.seed, rank, world)
    if options.resume and (out / CHECKPOINT).exists():
        trainer.load(out / CHECKPOINT)
    trainer.tick(0.0)
    return trainer


def run(rank: int, world: int, options: argparse.Namespace) -> None:
    """One process from start to end; rank 0 writes."""
    trainer = start(rank, world, options)
    out, recipe = Path(options.out), trainer.recipe
    log = Log(out, recipe.log_every) if rank == 0 else None
    if log:
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        log.say(f"parameters {parameters} rows {trainer.model.config.rows} processes {world} "
                f"from step {trainer.step}")
    checkpointed = evaluated = trainer.elapsed
    while trainer.progress < 1:
        begun = time.monotonic()
        numbers = trainer.train_step()
        trainer.tick(time.monotonic() - begun)
        if log:
            log.record(trainer, numbers)
        if trainer.elapsed - evaluated > EVALUATE_SECONDS:
            begun = time.monotonic()
            cells = trainer.evaluate(16)
            trainer.tick(time.monotonic() - begun)
            evaluated = trainer.elapsed
            if log:
                log.say(f"evaluation at step {trainer.step}\n{table(cells)}")
        if trainer.elapsed - checkpointed > CHECKPOINT_SECONDS:
            checkpointed = trainer.elapsed
            if rank == 0:
                trainer.save(out / CHECKPOINT)
    if rank == 0:
        trainer.save(out / CHECKPOINT)
    if recipe.steps == 0 or options.evaluate:
        trainer.model.quantized = True
        cells = trainer.evaluate(100)
        if log:
            log.say(f"final evaluation with MXFP4 experts\n{table(cells)}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


class Log:
    """Lines for people in log.txt, numbers in train_log.csv: means over some steps."""

    FIELDS = ("step", "seconds", "tokens", "loss", "balance", "gradient_norm", "learning_rate", "load_max",
              "load_min")

    def __init__(self, out: Path, every: int) -> None:
        self.out, self.every, self.begun = out, every, time.monotonic()
        self.sums: dict[str, float] = {}
        self.count, self.tokens = 0, 0
        if not (out / "train_log.csv").exists():
            self._append(self.FIELDS)

    def _append(self, values: tuple[object, ...]) -> None:
        with (self.out / "train_log.csv").open("a", newline="") as file:
            csv.writer(file).writerow(values)

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / "log.txt").open("a") as file:
            file.write(text + "\n")

    def record(self, trainer: Trainer, numbers: dict[str, float]) -> None:
        self.count += 1
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if trainer.step % self.every:
            return
        means = {name: value / self.count for name, value in self.sums.items()}
        now = time.monotonic()
        speed = (trainer.tokens - self.tokens) / (now - self.begun) if self.tokens else 0.0
        self.tokens, self.begun, self.sums, self.count = trainer.tokens, now, {}, 0
        self._append((trainer.step, round(trainer.elapsed, 1), trainer.tokens,
                      *(f"{means[name]:.5g}" for name in self.FIELDS[3:])))
        self.say(f"step {trainer.step} {trainer.elapsed:.0f}s loss {means['loss']:.4f} "
                 f"balance {means['balance']:.3f} norm {means['gradient_norm']:.2f} "
                 f"rate {means['learning_rate']:.5f} load {means['load_min']:.3f}-{means['load_max']:.3f} "
                 f"{trainer.tokens / 1e6:.2f}M tokens {speed:.0f}/s")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="nano")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0.0, help="time budget of the whole run")
    parser.add_argument("--steps", type=int, default=0, help="number of steps instead of a time budget")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--evaluate", action="store_true", help="evaluate at the end of a run of --steps")
    parser.add_argument("--port", type=int, default=29_517)
    options = parser.parse_args(arguments)
    # Spinning threads of two processes on two cores would starve each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["OMP_NUM_THREADS"] = "1"
    # Keep freed memory instead of giving it back: fresh pages cost a fifth of the time of a step.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 32))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (options.resume and (out / "rows.json").exists()):
        (out / "rows.json").write_text(json.dumps(corpus.vocabulary()))
    if options.processes == 1:
        run(0, 1, options)
    else:
        spawn(run, args=(options.processes, options), nprocs=options.processes)


if __name__ == "__main__":
    main()
