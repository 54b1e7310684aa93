"""Our files and Hugging Face's models on the same tasks of the lm-evaluation-harness."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MobileLLMError, ModelError

HUGGING_FACE = "hf:"  # in front of what transformers loads, encoder-decoder models included
METRICS = ("acc_norm,none", "acc,none", "exact_match,none")  # the first that a task has


@dataclass(frozen=True)
class TaskResult:
    """A model's figure for a task, and which figure it is."""

    model: str
    task: str
    metric: str
    value: float
    error: float | None


def run_tasks(
    models: Sequence[str],
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    n_threads: int = 0,
) -> list[TaskResult]:
    """Every model on every task: GGUF files, checkpoint folders and hub ids in our engine, those
    with `hf:` in front in transformers. `include` is a folder with tasks (YAML) of your own,
    `limit` the number of questions a task. Raises ModelError for tasks that are not known."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MobileLLMError("--tasks needs lm_eval: pip install 'mobilellm-cpp[eval]'") from None
    from .harness import MobileLLMModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ModelError(f"lm_eval knows no task {unknown[0]}")
    found = []
    for model in models:
        if model.startswith(HUGGING_FACE):
            name = model.removeprefix(HUGGING_FACE)
            run, arguments = "hf", f"pretrained={name},device=cpu,dtype=float32"
        else:
            run, arguments = MobileLLMModel(model, n_threads=n_threads), None
        results = simple_evaluate(
            model=run,
            model_args=arguments,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            verbosity="ERROR",
        )["results"]
        for task, figures in results.items():
            metric = next((name for name in METRICS if name in figures), None)
            if metric is not None:
                error = figures.get(metric.replace(",", "_stderr,"))
                found.append(
                    TaskResult(
                        model,
                        task,
                        metric.split(",")[0],
                        float(figures[metric]),
                        error if isinstance(error, float) else None,
                    )
                )
    return found
