"""Self-training round by round: mIoU raw → smooth → rounds, retrieval's mean recall beside it, over seeds.

In: the recipe of a course, that of an evaluation, a cluster file. Out: one table, mean ± half of the 95 % interval over
the seeds (Student's t), and for each of `--classes` its IoU. Courses and evaluations are artifacts: what is finished is
not done again. Masks are opened by the evaluations alone, which begin when the seed's course has ended.
Run: `python benchmarks/self_train.py configs/self_train/world_course.yaml configs/evaluate/world.yaml
cluster/local.yaml --seeds 0 1 2`
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

Row = dict[str, float]
# Student's t at 97.5 % for 1, 2, … degrees of freedom: half of a 95 % interval in standard errors.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def measure(config: EvaluateConfig, model: str, cluster: Cluster) -> Row:
    """The numbers of one model under the evaluation's benchmarks, by column."""
    name, version = model.split("/")[1:]
    made = evaluate(
        config.model_copy(update={"model": model, "output": f"evaluation/by_round_{name}/{version}"}), cluster
    )
    benchmarks: dict[str, dict[str, Any]] = storage.read_json(made.path("report.json"))["benchmarks"]
    row: Row = {}
    for result in benchmarks.values():
        if "mean_recall" in result:
            row["mean recall"] = result["mean_recall"]
        for method in ("raw", "smooth"):
            if f"{method}_miou" in result:
                row[f"mIoU {method}"] = result[f"{method}_miou"]
                row |= {f"{name} {method}": iou for name, iou in result[f"{method}_iou_by_class"].items()}
    return row


def course_rows(config: SelfTrainConfig, evaluation: EvaluateConfig, cluster: Cluster) -> dict[str, Row]:
    """One course and then the evaluation of each of its rounds, also of the one that ended it."""
    made = self_train(config, cluster)
    rows = {}
    for entry in storage.read_json(made.path("rounds.json")):
        row = measure(evaluation, round_ref(config.output, entry["round"]), cluster)
        row["agreement"] = 100 * entry["held_out_agreement"]
        rows[f"round {entry['round']}{'' if entry['kept'] else ' (rejected)'}"] = row
    return rows


def interval(values: list[float]) -> str:
    """Mean ± half of the 95 % interval, with one value the value."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    half = STUDENT_T[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def parse() -> argparse.Namespace:
    """Recipes, seeds, and which classes have columns of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("course")
    parser.add_argument("evaluation")
    parser.add_argument("cluster")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--classes", nargs="*", default=[], help="e.g. a class that no caption of the training names")
    return parser.parse_args()


def main() -> None:
    """Run what is missing and print the table."""
    arguments = parse()
    if len(arguments.seeds) > len(STUDENT_T) + 1:
        raise SystemExit(f"at most {len(STUDENT_T) + 1} seeds")
    cluster = load_cluster(arguments.cluster)
    evaluation = load_config(EvaluateConfig, arguments.evaluation)
    course = load_config(SelfTrainConfig, arguments.course)
    columns = ["mIoU raw", "mIoU smooth", "mean recall", "agreement"]
    columns += [f"{name} {method}" for name in arguments.classes for method in ("raw", "smooth")]
    rows: dict[str, list[Row]] = defaultdict(list)
    rows["untaught"].append(measure(evaluation, course.model, cluster))
    for seed in arguments.seeds:
        own = course.model_copy(update={"seed": seed, "output": f"{course.output}-seed{seed}"})
        for name, row in course_rows(own, evaluation, cluster).items():
            rows[name].append(row)
            print(f"seed {seed} {name}: " + ", ".join(f"{key} {row[key]:.1f}" for key in columns), flush=True)
    print("| model | runs | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for name, found in rows.items():
        values = [interval([row[key] for row in found]) if key in found[0] else "" for key in columns]
        print(f"| {name} | {len(found)} | " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
