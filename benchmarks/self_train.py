"""Self-training round by round: mIoU raw → smooth → rounds, retrieval's mean recall beside it, over seeds.

In: the recipe of a course, that of an evaluation, a cluster file, and the recipe of the model if each seed is to train
its own. Out: one table, mean ± half of the 95 % interval over the seeds (Student's t), that of the change against the
untaught model of the same seed, and for each of `--classes` its IoU. Models, courses and evaluations are artifacts:
what is finished is not done again. Masks are opened by evaluations alone, which begin when the seed's course has ended.
Run: `python benchmarks/self_train.py configs/self_train/world_course.yaml configs/evaluate/world.yaml
cluster/local.yaml --pretrain configs/pretrain/world.yaml --seeds 0 1 2`
"""

import argparse
import statistics
from collections import defaultdict
from typing import Any

from rsplatform import storage
from rsplatform.cluster import Cluster, load_cluster
from rsplatform.config import load_config
from rsplatform.evaluate.run import EvaluateConfig, evaluate
from rsplatform.localize.self_train import SelfTrainConfig, round_ref, self_train
from rsplatform.train.launch import pretrain
from rsplatform.train.recipe import PretrainConfig

Row = dict[str, float]
# Student's t at 97.5 % for 1, 2, … degrees of freedom: half of a 95 % interval in standard errors.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def measure(config: EvaluateConfig, model: str, cluster: Cluster) -> Row:
    """The numbers of one model under the evaluation's benchmarks, by column; those of several masks by benchmark."""
    name, version = model.split("/")[1:]
    output = f"evaluation/{config.output.split('/')[1]}_of_{name}/{version}"
    made = evaluate(config.model_copy(update={"model": model, "output": output}), cluster)
    benchmarks: dict[str, dict[str, Any]] = storage.read_json(made.path("report.json"))["benchmarks"]
    row: Row = {}
    for benchmark, result in benchmarks.items():
        if "mean_recall" in result:
            row[f"{benchmark} mean recall"] = result["mean_recall"]
        for method in ("raw", "smooth"):
            if f"{method}_miou" in result:
                row[f"{benchmark} {method}"] = result[f"{method}_miou"]
                by_class = result[f"{method}_iou_by_class"].items()
                row |= {f"{benchmark} {name} {method}": iou for name, iou in by_class}
    return row


def course_rows(config: SelfTrainConfig, evaluation: EvaluateConfig, cluster: Cluster) -> dict[str, Row]:
    """A course, then the evaluation of its model and of each of its rounds, also of the one that ended it."""
    made = self_train(config, cluster)
    rows = {"untaught": measure(evaluation, config.model, cluster)}
    for entry in storage.read_json(made.path("rounds.json")):
        row = measure(evaluation, round_ref(config.output, entry["round"]), cluster)
        row["agreement"] = 100 * entry["held_out_agreement"]
        rows[f"round {entry['round']}{' (rejected)' if entry['rejected'] else ''}"] = row
    return rows


def interval(values: list[float]) -> str:
    """Mean ± half of the 95 % interval, with one value the value."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    half = STUDENT_T[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def print_table(courses: list[dict[str, Row]], columns: list[str]) -> None:
    """Each kind of model: its mean over the courses, and how far it is above the untaught model of its own course."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for course in courses:
        for name, row in course.items():
            rows[name].append(row)
            if name != "untaught":
                gains = {key: row[key] - course["untaught"][key] for key in row.keys() & course["untaught"].keys()}
                rows[f"{name}, change"].append(gains)
    columns = [key for key in columns if any(key in row for found in rows.values() for row in found)]
    print("| model | runs | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for name, found in rows.items():
        values = [interval([row[key] for row in found]) if key in found[0] else "" for key in columns]
        print(f"| {name} | {len(found)} | " + " | ".join(values) + " |")


def parse() -> argparse.Namespace:
    """Recipes, seeds, and which classes have columns of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("course")
    parser.add_argument("evaluation")
    parser.add_argument("cluster")
    parser.add_argument("--pretrain", help="the recipe of the course's model: each seed trains one of its own")
    parser.add_argument("--root", help="of artifacts, instead of the cluster file's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--classes", nargs="*", default=[], help="e.g. a class that no caption of the training names")
    return parser.parse_args()


def main() -> None:
    """Run what is missing and print the table."""
    arguments = parse()
    if len(arguments.seeds) > len(STUDENT_T) + 1:
        raise SystemExit(f"at most {len(STUDENT_T) + 1} seeds")
    cluster = load_cluster(arguments.cluster, [f"root={arguments.root}"] if arguments.root else [])
    evaluation = load_config(EvaluateConfig, arguments.evaluation)
    course = load_config(SelfTrainConfig, arguments.course)
    recipe = load_config(PretrainConfig, arguments.pretrain) if arguments.pretrain else None
    names = [benchmark.name for benchmark in evaluation.benchmarks]
    methods = ("raw", "smooth")
    by_class = [f"{name} {sought} {each}" for name in names for sought in arguments.classes for each in methods]
    columns = [f"{name} {value}" for name in names for value in ("mean recall", "raw", "smooth")]
    seeds = {}
    for seed in arguments.seeds:
        own = course.model_copy(update={"seed": seed, "output": f"{course.output}-seed{seed}"})
        if recipe:
            updates = {"seed": seed, "output": f"{recipe.output}-seed{seed}"}
            own = own.model_copy(update={"model": pretrain(recipe.model_copy(update=updates), cluster).ref})
        seeds[seed] = course_rows(own, evaluation, cluster)
        for name, row in seeds[seed].items():
            print(f"seed {seed} {name}: " + ", ".join(f"{key} {value:.1f}" for key, value in row.items()), flush=True)
    print_table(list(seeds.values()), [*columns, *by_class, "agreement"])


if __name__ == "__main__":
    main()
