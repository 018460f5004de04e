"""The demo's closing words: artifacts and one search answer in, facts and a text that a person can read out.

Every number is read back from a manifest, a report or an HTTP answer; nothing is computed again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rsplatform.artifacts import Artifact
from rsplatform.train.trials import TRIAL

BARS = "▁▂▃▄▅▆▇█"


def collect(
    made: Mapping[str, Artifact], stood: Sequence[str], answer: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Facts of one run: funnels, training, evaluation before and after self-training, the sweep, the search.

    `stood` names the stages that an earlier run had made: `seconds` does not hold their time.
    """
    manifests = {name: artifact.manifest() for name, artifact in made.items()}
    facts = {
        "seconds": seconds,
        "stood": list(stood),
        "scenes": manifests["ingest_scenes"]["counts"]["scenes"],
        "chips": _funnel(manifests["ingest_scenes"]["counts"]),
        "web": _funnel(manifests["filter_web"]["counts"]),
        "dataset": _funnel(manifests["build_dataset"]["counts"]),
        "overhead": manifests["train_overhead"]["metrics"],
        "history": made["pretrain"].read_json("history.json"),
        "training": manifests["pretrain"]["counts"],
        "training_metrics": manifests["pretrain"]["metrics"],
        "sweep": _sweep(made["tune"], manifests["tune"]),
        "rounds": made["self_train"].read_json("rounds.json"),
        "evaluation": made["evaluate"].read_json("report.json")["benchmarks"],
        "self_trained": made["evaluate_self_trained"].read_json("report.json")["benchmarks"],
        "regions": manifests["localize"]["metrics"]["regions"],
        "search": answer["results"][0],
        "folders": {name: artifact.uri for name, artifact in made.items()},
    }
    return facts


def numbers(facts: Mapping[str, Any]) -> dict[str, float]:
    """The scalars that two runs of the demo are compared by."""
    flat = {"seconds": facts["seconds"], "search_score": facts["search"]["score"]}
    for name, scores in facts["evaluation"].items():
        flat |= {f"{name}/{key}": value for key, value in scores.items() if isinstance(value, int | float)}
    for name, scores in facts["self_trained"].items():
        flat |= {f"self_trained/{name}/{k}": value for k, value in scores.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in flat.items()}


def _sweep(artifact: Artifact, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How many trials there were, the best one's held-out loss and the values that it was drawn with."""
    best = int(manifest["metrics"]["best/trial"])
    objective = manifest["config"]["objective"]
    return manifest["counts"] | {
        "trial": best,
        "objective": objective,
        "loss": manifest["metrics"][f"best/{objective}"],
        "values": artifact.read_json(f"trials/{best}/{TRIAL}")["values"],
    }


def render(facts: Mapping[str, Any], query: str, next_commands: Sequence[str]) -> str:
    """The summary as plain text; `next_commands` are its last lines."""
    training, metrics = facts["training"], facts["training_metrics"]
    losses = [row["loss"] for row in facts["history"] if "loss" in row]
    lines = [
        _headline(facts["seconds"], len(facts["folders"]), facts["stood"]),
        "",
        f"  scenes     {_kept(facts['scenes'])}",
        f"  chips      {_kept(facts['chips'])}",
        f"  overhead   average precision {_overhead(facts['overhead'])}",
        f"  web pairs  {_kept(facts['web'])}",
        f"  dataset    {_kept(facts['dataset'])}",
        f"  training   loss {losses[0]:.2f} {sparkline(losses)} {losses[-1]:.2f} · {training['samples_seen']:,} "
        f"samples in {metrics['training_minutes']:.1f} min{_stopped(training)}",
        f"  sweep      {_best_trial(facts['sweep'])}",
        *(line for name, scores in facts["evaluation"].items() for line in _scores(name, scores, facts)),
        f"  self-train {_rounds(facts['rounds'])}",
        f"  on a map   {facts['regions']:.0f} regions as GeoJSON and COGs in {facts['folders']['localize']}",
        *_search(facts["search"], query),
        "",
        *next_commands,
    ]
    return "\n".join(lines) + "\n"


def _headline(seconds: float, num_arrows: int, stood: Sequence[str]) -> str:
    minutes = f"{seconds / 60:.1f} min"
    if not stood:
        return f"rsplatform demo: every arrow ran, in {minutes}"
    ran = num_arrows - len(stood)
    return f"rsplatform demo: {ran} of {num_arrows} arrows ran, in {minutes}; from an earlier run: {', '.join(stood)}"


def _best_trial(sweep: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name} {value}" for name, value in sweep["values"].items())
    return (
        f"trial {sweep['trial']} of {sweep['trials']} ({sweep['stopped_early']} stopped early) is best: "
        f"{sweep['objective']} {sweep['loss']:.3f} with {values}"
    )


def _overhead(metrics: Mapping[str, float]) -> str:
    suffix = "_average_precision"
    found = {key.removesuffix(suffix): value for key, value in metrics.items() if key.endswith(suffix)}
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())


def _stopped(training: Mapping[str, Any]) -> str:
    return " (STOPPED EARLY by max_minutes)" if training["stopped_early"] else ""


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> str:
    """What each round did; a rejected one leaves the model as it was."""
    reasons = [entry["rejected"] for entry in rounds]
    verdicts = [f"REJECTED ({reason}), the model stays as it was" if reason else "kept" for reason in reasons]
    lines = [
        f"round {entry['round']} {verdict}: agreement of views "
        f"{100 * entry['held_out_agreement_before']:.1f} → {100 * entry['held_out_agreement']:.1f} %"
        for entry, verdict in zip(rounds, verdicts, strict=True)
    ]
    return "; ".join(lines)


def sparkline(values: list[float], width: int = 32) -> str:
    """A curve in one line of text; values are averaged into at most `width` bars."""
    size = max(1, -(-len(values) // width))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in means)


def _funnel(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: counts[key] for key in ("inputs", "kept", "dropped")}


def _kept(funnel: Mapping[str, Any]) -> str:
    dropped = funnel["dropped"]
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in sorted(dropped.items(), key=lambda item: -item[1]))
    tail = f" + {sum(dropped.values()):,} dropped ({reasons})" if dropped else ""
    return f"{funnel['inputs']:,} = {funnel['kept']:,} kept{tail}"


def _scores(name: str, scores: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """One line for a benchmark, whatever its kind."""
    after = facts["self_trained"].get(name, {})
    if "t2i_r10" in scores:
        chance = scores["chance_t2i_r10"]
        text = (
            f"text→image R@10 {scores['t2i_r10']:.1f} % = {scores['t2i_r10'] / chance:.1f} × chance ({chance:.2f} %), "
            f"mean recall {scores['mean_recall']:.1f} %, {scores['num_images']:,} pictures"
        )
    elif "top1" in scores:
        text = f"zero-shot top-1 {scores['top1']:.1f} % (chance {scores['chance_top1']:.1f} %)"
    else:
        text = f"mIoU raw {scores['raw_miou']:.1f} → smooth {scores['smooth_miou']:.1f}"
        text += f" → self-trained {after['smooth_miou']:.1f} %" if after else " %"
        if "nearest_colour_miou" in scores:
            text += f" (nearest colour {scores['nearest_colour_miou']:.1f} %)"
    if after and "mean_recall" in scores:
        text += f"; self-trained {after['mean_recall']:.1f} %"
    return [f"  {name:<10} {text}  [{scores['pin']}]"]


def _search(result: Mapping[str, Any], query: str) -> list[str]:
    west, south, east, north = result["bounds_lonlat"]
    lines = [
        f"  search     “{query}” → chip {result['chip_id']} (score {result['score']:.2f}), "
        f"lon {(west + east) / 2:.5f} lat {(south + north) / 2:.5f}",
        f"             it says: {result['caption']}",
    ]
    spot = result.get("spot")
    if spot:
        row, column = spot["peak_fraction"]
        place = f" = lon {spot['peak_lonlat'][0]:.5f} lat {spot['peak_lonlat'][1]:.5f}" if spot["peak_lonlat"] else ""
        lines.append(
            f"             where in it: {100 * row:.0f} % from the top, {100 * column:.0f} % from the left{place}"
        )
    return lines
