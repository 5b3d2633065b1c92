"""Task accuracies through EleutherAI's lm-eval, which is asked for only here and only when used."""
from __future__ import annotations

import os
from collections.abc import Sequence

from torch import nn

from .errors import BackendUnavailable, ConfigError


def run_tasks(model: nn.Module, tokenizer, tasks: Sequence[str], folder: str | os.PathLike | None = None, limit: int | None = None,
              shots: int | None = None, batch: int = 1) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of a model and its tokenizer, on names that lm-eval knows or that YAML files in `folder` define.

    limit: items of each task; shots: examples in the prompt, default the task's own.  Raises BackendUnavailable where lm-eval is not
    installed, ConfigError for unknown tasks, and for tasks whose data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BackendUnavailable(f"--tasks needs the package lm-eval ({error}): pip install 'lm-eval[hf]'") from error
    if tokenizer is None:
        raise ConfigError("--tasks: the model's folder holds no tokenizer; copy its tokenizer files into it")
    if folder is not None and not os.path.isdir(folder):
        raise ConfigError(f"task folder: no such folder: {str(folder)!r}; need one that holds lm-eval's YAML files")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if missing := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(f"tasks: lm-eval knows no {', '.join(missing)}; name its tasks, or give your own YAML files with --task-folder")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    try:
        found = simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=shots, bootstrap_iters=0,
                                random_seed=None, numpy_random_seed=None, torch_random_seed=None)      # the caller's generators stay
    except (OSError, ValueError, ConnectionError) as error:     # data sets that are not there, files that are none
        raise ConfigError(f"tasks {', '.join(tasks)}: lm-eval cannot run them ({type(error).__name__}: {error}); without a network, give "
                          "--task-folder with YAML files that name local data") from error
    # Keys are "metric,filter"; others name the task and count its items.
    return {task: {metric.removesuffix(",none"): value for metric, value in values.items() if "," in metric and "stderr" not in metric}
            for task, values in found["results"].items()}
