"""Scaling on paper: samples/s, cost and memory of each engine on 1, 8, 64, 512 GPUs, and where it stops paying.

In: what one GPU does (--samples-per-s, measured by gpu_step.py), the links, the price. What is not given is assumed and
printed as such. Out: a table per number of GPUs (`room`: samples that the memory holds) and a sentence per engine.
Nothing is run: the bytes are those of rsplatform/train/traffic.py, which a test holds to real steps (plain, FSDP2);
the seconds are its model of a network.
Left out: stragglers, restarts, reading data, and that a smaller batch per GPU computes less efficiently.
Run: `python benchmarks/scaling.py --samples-per-s 480 --price-per-gpu-hour 3.5`
"""

import argparse
import math
from dataclasses import dataclass

from rsplatform.model.mammut import MammutConfig, mammut_config
from rsplatform.train.meter import training_flops_per_sample
from rsplatform.train.traffic import (
    Layout,
    ModelNumbers,
    Network,
    TrafficEngine,
    contrastive_transfers,
    model_numbers,
    sent_bytes,
    state_bytes,
    weight_transfers,
)

NUM_DEVICES = (1, 8, 64, 512)
# Titles of the table; "fsdp/node" shards over the GPUs of a node and copies between nodes.
ENGINES: dict[str, TrafficEngine] = {
    "all_reduce (plain)": "plain", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3",
    "FSDP2 full shard": "fsdp", "FSDP2 HSDP": "fsdp",
}  # fmt: skip
# Costlier than the cheapest by more than this is called "no longer paying" (our default).
TOLERATED_EXTRA_COST = 0.05


@dataclass(frozen=True)
class Setting:
    """What the estimate rests on, beside the network."""

    samples_per_s: float
    batch_size: int
    global_batch_size: int
    memory_gb: float
    activation_mb_per_sample: float
    price_per_hour: float


@dataclass(frozen=True)
class Estimate:
    """One engine on one number of devices."""

    title: str
    num_devices: int
    batch_size: int
    sent_gb: float
    network_s: float
    exposed_s: float
    computing_s: float
    memory_gb: float
    room: int

    @property
    def fits(self) -> bool:
        """Whether the batch does; `room` is how many samples would."""
        return self.room >= self.batch_size

    @property
    def samples_per_s(self) -> float:
        """Of all devices."""
        return self.num_devices * self.batch_size / (self.computing_s + self.exposed_s)

    @property
    def efficiency(self) -> float:
        """Part of the time that the devices compute."""
        return self.computing_s / (self.computing_s + self.exposed_s)

    def cost_per_million(self, price_per_hour: float) -> float:
        """Of a million samples."""
        return 1e6 / self.samples_per_s / 3600 * self.num_devices * price_per_hour


def estimate(title: str, num_devices: int, numbers: ModelNumbers, network: Network, setting: Setting) -> Estimate:
    """Weak scaling up to the largest useful global batch, then strong: fewer samples per device."""
    batch_size = max(1, min(setting.batch_size, setting.global_batch_size // num_devices))
    is_hybrid = title.endswith("HSDP")
    shard_size = min(num_devices, network.devices_per_node) if is_hybrid else None
    layout = Layout(ENGINES[title], num_devices, shard_size)
    transfers = weight_transfers(layout, numbers)
    transfers += contrastive_transfers(num_devices, batch_size, numbers.embedding_width)
    computing_s = batch_size / setting.samples_per_s
    state_gb = state_bytes(layout, numbers, autocasts=True) / 1e9
    activation_gb = setting.activation_mb_per_sample / 1e3
    room = max(0, math.floor((setting.memory_gb - state_gb) / activation_gb))
    return Estimate(
        title, num_devices, batch_size, sent_bytes(transfers) / 1e9,
        sum(network.seconds(transfer) for transfer in transfers), network.exposed_seconds(transfers, computing_s),
        computing_s, state_gb + batch_size * activation_gb, room,
    )  # fmt: skip


def print_table(rows: list[Estimate], price_per_hour: float) -> None:
    """One line per engine."""
    first = rows[0]
    print(f"\n{first.num_devices} GPU{'s' * (first.num_devices > 1)}, {first.batch_size} samples each and step:")
    print(
        f"  {'engine':20} {'GB/step':>8} {'network s':>9} {'exposed s':>9} {'samples/s':>10} {'efficient':>9} "
        f"{'cost 1 M':>8} {'cost 1 B':>10} {'GB/GPU':>7} {'room':>5}"
    )
    for row in rows:
        cost = row.cost_per_million(price_per_hour)
        print(
            f"  {row.title:20} {row.sent_gb:8.2f} {row.network_s:9.4f} {row.exposed_s:9.4f} {row.samples_per_s:10,.0f} "
            f"{row.efficiency:9.1%} {cost:8.2f} {1e3 * cost:10,.0f} {row.memory_gb:7.1f} {row.room:5d}"
            + ("" if row.fits else "  does not fit")
        )


def where_it_stops(title: str, tables: dict[int, list[Estimate]]) -> str:
    """A sentence: the first number of GPUs where the engine costs clearly more than the cheapest one that fits."""
    for num_devices, rows in tables.items():
        own = next(row for row in rows if row.title == title)
        fitting = [row for row in rows if row.fits]
        if not own.fits:
            return f"{title}: does not fit the card on {num_devices} GPUs ({own.memory_gb:.0f} GB)."
        best = max(fitting, key=lambda row: row.samples_per_s)
        extra = best.samples_per_s / own.samples_per_s - 1
        if extra > TOLERATED_EXTRA_COST:
            return (
                f"{title}: stops paying at {num_devices} GPUs, {extra:.0%} dearer than {best.title}: of each step "
                f"{own.exposed_s:.3f} s are waiting for the network, there {best.exposed_s:.3f} s."
            )
    return f"{title}: within {TOLERATED_EXTRA_COST:.0%} of the cheapest up to {max(tables)} GPUs."


def print_contrastive(batch_size: int, numbers: ModelNumbers, network: Network) -> None:
    """The part of the contrastive loss in the traffic, the same for every engine."""
    print(f"\nContrastive features (B {batch_size} × E {numbers.embedding_width} × 2, float32), in every engine's sum:")
    for num_devices in NUM_DEVICES[1:]:
        gather, gradient = contrastive_transfers(num_devices, batch_size, numbers.embedding_width)
        seconds = network.seconds(gather) + network.seconds(gradient)
        sizes = f"gather {gather.sent_bytes / 1e9:.3f} GB, gradient {gradient.sent_bytes / 1e9:.3f} GB"
        print(f"  {num_devices:4d} GPUs: {sizes}, together {seconds:.4f} s")


def pace(arguments: argparse.Namespace, model: MammutConfig) -> float:
    """Samples a second of one GPU: measured if given, else the assumed part of the peak, and says which."""
    flops = training_flops_per_sample(model, arguments.tokens, model.vision.image_size)
    if arguments.samples_per_s is not None:
        print(f"one GPU: {arguments.samples_per_s:.0f} samples/s (given)")
        return arguments.samples_per_s
    samples_per_s = arguments.mfu * arguments.peak_tflops * 1e12 / flops
    print(
        f"one GPU: {samples_per_s:.0f} samples/s, ASSUMED: {arguments.mfu:.0%} of {arguments.peak_tflops:.0f} TFLOP/s "
        f"at {flops / 1e12:.3f} TFLOP a sample (T = {arguments.tokens}); give --samples-per-s for a measured one"
    )
    return samples_per_s


def parsed() -> argparse.Namespace:
    """Arguments; every default is an assumption, and main says which were left at it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="so400m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--samples-per-s", type=float, help="of one GPU, measured")
    parser.add_argument("--mfu", type=float, default=0.5, help="assumed where no samples/s is given")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="of one H200's bfloat16 matrix product")
    parser.add_argument("--batch-size", type=int, default=256, help="of one GPU")
    parser.add_argument("--global-batch-size", type=int, default=32768, help="larger ones do not train better")
    parser.add_argument("--memory-gb", type=float, default=150.0, help="of one GPU (139 GiB)")
    parser.add_argument("--activation-mb", type=float, default=420.0, help="a sample, without recomputation")
    parser.add_argument("--device-gb-s", type=float, default=360.0, help="NVLink, one direction: 80 %% of 450")
    parser.add_argument("--node-gb-s", type=float, default=320.0, help="network of a node: 80 %% of 8 × 50")
    parser.add_argument("--devices-per-node", type=int, default=8)
    parser.add_argument("--hop-latency-us", type=float, default=5.0)
    parser.add_argument("--price-per-gpu-hour", type=float, help="in any currency; without it, cost is in GPU hours")
    return parser.parse_args()


def main() -> None:
    """Estimate, print."""
    arguments = parsed()
    model = mammut_config(arguments.size)
    numbers = model_numbers(model)
    price = arguments.price_per_gpu_hour
    print(f"{arguments.size}: {numbers.total / 1e6:.0f} M parameters; all that crosses the network is float32")
    setting = Setting(
        pace(arguments, model), arguments.batch_size, arguments.global_batch_size, arguments.memory_gb,
        arguments.activation_mb, 1.0 if price is None else price,
    )  # fmt: skip
    network = Network(arguments.device_gb_s, arguments.node_gb_s, arguments.devices_per_node, arguments.hop_latency_us)
    print(
        f"ASSUMED unless given: {network.device_gb_s:.0f} GB/s a GPU in a node, {network.node_gb_s:.0f} GB/s a node of "
        f"{network.devices_per_node}, {network.hop_latency_us:.0f} µs a hop; {setting.activation_mb_per_sample:.0f} MB "
        f"activations a sample, {setting.memory_gb:.0f} GB a GPU, global batch at most {setting.global_batch_size:,}"
    )
    print("cost: GPU hours (no price given)" if price is None else f"cost: at {price} a GPU hour, as given")
    print("overlap as the engines run: plain, ZeRO-1 and -2 none; ZeRO-3 and FSDP2 beside all of the computing")
    tables = {n: [estimate(title, n, numbers, network, setting) for title in ENGINES] for n in NUM_DEVICES}
    for rows in tables.values():
        print_table(rows, setting.price_per_hour)
    print_contrastive(setting.batch_size, numbers, network)
    print()
    for title in ENGINES:
        print(where_it_stops(title, tables))


if __name__ == "__main__":
    main()
