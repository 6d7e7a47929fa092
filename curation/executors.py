"""Where a stage's tasks run: on this machine's processes, on a Ray cluster, or as a share of a job array."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from curation.work import Task, task_folder, write_plan
from curation.workers import Job, Worker, run_jobs

# The steps of a group's pipeline for a plan; the plan's tasks are the pipeline's ranks.
Pipeline = Callable[[Path], list[PipelineStep]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tasks of one stage that share a pipeline: those of one source, mostly."""

    name: str
    tasks: Sequence[Task]
    pipeline: Pipeline


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    groups: Sequence[Group]

    def missing(self, work: Path) -> int:
        return sum(not task_folder(work, self.name, t.key).is_dir() for group in self.groups for t in group.tasks)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which tasks are ours when several hosts do a stage: every n-th, from the i-th."""

    index: int = 0
    of: int = 1

    def __str__(self) -> str:
        return f"{self.index}-of-{self.of}"


def pending(stage: Stage, work: Path, share: Share) -> list[tuple[Group, Path, list[Task]]]:
    """The tasks of our share that are not done, longest first, as one plan for each group."""
    plans = []
    for group in stage.groups:
        tasks = sorted(group.tasks, key=lambda task: (-task.size_bytes, task.key))[share.index :: share.of]
        left = [task for task in tasks if not task_folder(work, stage.name, task.key).is_dir()]
        if left:
            plan = work / "plans" / f"{stage.name}-{group.name}-{share}.jsonl"
            write_plan(plan, left)
            plans.append((group, plan, left))
    return plans


def run_local(stage: Stage, work: Path, share: Share, workers: Sequence[Worker]) -> None:
    """Run our share on this machine, the longest tasks of all groups first."""
    jobs = []
    for group, plan, tasks in pending(stage, work, share):
        executor = LocalPipelineExecutor(
            group.pipeline(plan),
            tasks=len(tasks),
            logging_dir=str(work / "log" / f"{stage.name}-{group.name}-{share}"),
            skip_completed=False,  # what is done is not in the plan
        )
        jobs += [Job(executor=executor, rank=rank, task=task) for rank, task in enumerate(tasks)]
    jobs.sort(key=lambda job: -job.task.size_bytes)
    run_jobs(workers, work, jobs, stage.name)


def run_ray(stage: Stage, work: Path, n_workers: int) -> None:
    """Run the stage on the Ray cluster of RAY_ADDRESS, or on one that starts here; `work` must be seen by all of it.

    datatrove's executor tries a failed task three times. Raises RuntimeError when tasks are left.
    """
    from datatrove.executor.ray import RayPipelineExecutor

    for group, plan, tasks in pending(stage, work, Share()):
        RayPipelineExecutor(
            group.pipeline(plan),
            tasks=len(tasks),
            workers=n_workers,
            logging_dir=str(work / "log" / f"{stage.name}-{group.name}-ray"),
            skip_completed=False,
            mem_per_cpu_gb=1,
        ).run()
    if left := stage.missing(work):
        raise RuntimeError(f"{left} tasks of stage {stage.name} failed under Ray; see {work / 'log'}, then go on")


def slurm_scripts(
    command: str, stages: Mapping[str, int], folder: Path, time_limit: str, partition: str, cpus: int, mem_gb: int
) -> list[Path]:
    """Write one job array for each stage, {name: jobs}, and submit.sh, which chains them; returns the files.

    Each job does its share of the stage on all `cpus` of its node with the same watched processes as on one machine.
    """
    from datatrove.executor.slurm import SlurmPipelineExecutor

    folder.mkdir(parents=True, exist_ok=True)
    chain, files = ["#!/bin/bash", "# Submits the stages; each waits for the one before it.", "set -e", "after="], []
    for name, n_jobs in stages.items():
        executor = SlurmPipelineExecutor(
            pipeline=[],
            tasks=n_jobs,
            time=time_limit,
            partition=partition,
            cpus_per_task=cpus,
            mem_per_cpu_gb=mem_gb,
            job_name=f"curate-{name}",
            logging_dir=str(folder / "log" / name),
        )
        share = f"--stage {name} --share $SLURM_ARRAY_TASK_ID/{n_jobs} --workers {cpus}"
        script = folder / f"{name}.sbatch"
        script.write_text(executor.get_launch_file_contents(executor.get_sbatch_args(n_jobs), f"{command} {share}"))
        chain.append(
            f'after=$(sbatch --parsable ${{after:+--dependency=afterok:$after}} "$(dirname "$0")/{name}.sbatch")'
        )
        chain.append(f"echo {name}: job $after")
        files.append(script)
    submit = folder / "submit.sh"
    submit.write_text("\n".join(chain) + "\n")
    submit.chmod(0o755)
    return [*files, submit]
