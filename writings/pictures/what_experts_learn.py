"""Texts, tables and picture of writings/what_experts_learn.md, which has the commands.

    python writings/pictures/what_experts_learn.py texts FOLDER
    python writings/pictures/what_experts_learn.py measure FOLDER_OF_SEED...

`texts` writes three held-out texts: fables.txt of the last tenth of the fables, verse.txt and prose.txt of that
of Tiny Shakespeare: speeches of three lines or more, verse if every line begins with a capital letter, prose if
most lines after the first do not.

`measure` reads one folder for each seed with the traces `step_0015.safetensors`, ... of its checkpoints, prints the
tables (mean over layers; mean and range over seeds), and draws what_experts_learn.png.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from moezoo.core.analysis.analyze import Analysis, analyze
from moezoo.core.analysis.chosen import is_chosen, share
from moezoo.core.analysis.domains import measure_domains
from moezoo.core.analysis.vocabulary import measure_vocabulary
from moezoo.core.data.datasets import dataset_path
from moezoo.core.traces.trace import RoutingTrace, TraceRows, trace_of
from moezoo.core.traces.trace_file import open_trace

_CHARACTERS = 9_500
_COLORS = ("#0072B2", "#D55E00", "#009E73")
_GRAY = "#8a97a3"

Values = Mapping[str, float]


def write_texts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    held_out = {}
    for name in ("fables", "tiny_shakespeare"):
        text = dataset_path(name).read_text(encoding="utf-8")
        held_out[name] = text[len(text) - len(text) // 10 :]
    speeches: dict[str, list[str]] = {"verse": [], "prose": []}
    for speech in held_out["tiny_shakespeare"].split("\n\n"):
        lines = speech.split("\n")[2:]  # without the speaker and the first line
        if len(lines) < 2:
            continue
        lower = sum(line[:1].islower() for line in lines) / len(lines)
        if lower == 0 or lower > 0.5:
            speeches["verse" if lower == 0 else "prose"].append(speech)
    texts = {"fables": held_out["fables"]} | {name: "\n\n".join(found) for name, found in speeches.items()}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text[:_CHARACTERS], encoding="utf-8")
        print(f"{name}: {len(text):,} characters found, {min(len(text), _CHARACTERS):,} written")


def measure(folders: Sequence[Path]) -> None:
    curves, lasts = [], []
    for folder in folders:
        traces = [open_trace(path) for path in sorted(folder.glob("step_*.safetensors"))]
        analysis = analyze(traces)
        curves.append([values_of(analysis, place) for place in range(len(traces))])
        lasts.append(analysis)
        print(f"read {folder}", file=sys.stderr)
    steps = [int(Path(one.trace.where).stem.removeprefix("step_")) for one in lasts[0].traces]
    print_curves(steps, curves)
    print_contexts([analysis.last.trace for analysis in lasts])
    print_layers(lasts)
    print_groupings(lasts)
    draw(steps, curves)


def values_of(analysis: Analysis, place: int) -> Values:
    """Return the measures of a trace, as means over layers."""
    one, domains = analysis.traces[place], analysis.traces[place].domains or ()
    own, following = one.vocabulary or ()
    found = {
        "loss": float(np.nanmean(one.trace.column("loss"))),
        "MaxVio": np.mean([layer.max_violation for layer in one.load]),
        "shift": np.mean([layer.shift.mean() for layer in domains]),
        "shift by chance": np.mean([layer.chance.mean() for layer in domains]),
        "shift by characters": shift_by_ids(one.trace).mean(),
        "input": np.mean([layer.mean for layer in own.layers]),
        "input by chance": np.mean([layer.chance for layer in own.layers]),
        "next": np.mean([layer.mean for layer in following.layers]),
        "pair lift": np.nanmean(pair_lifts(analysis, place)),
        "from previous": np.mean([layer.from_previous for layer in one.predictability[1:]]),
        "most loaded": np.mean([layer.most_loaded for layer in one.predictability[1:]]),
    }
    if place < len(analysis.saturation):
        saturation = analysis.saturation[place]
        found |= {"saturation": saturation.all_experts.mean(), "saturation by chance": saturation.chance.mean()}
    return found


def pair_lifts(analysis: Analysis, place: int) -> list[float]:
    """Return the lift of each layer's strongest pair."""
    one = analysis.traces[place].coactivation
    pairs = [one.strongest(layer) for layer in range(len(one.layers))]
    return [np.nan if pair is None else pair.lift for pair in pairs]


def shift_by_ids(trace: RoutingTrace) -> np.ndarray:
    """Return the shift of each text and layer if an id chose its experts in the same way in every text."""
    rows, chosen = trace.rows(), is_chosen(trace, 0, trace.num_tokens)
    known = chosen.any(axis=(1, 2))
    token, domain, chosen = rows.token[known], rows.domain[known], chosen[known]
    by_id = np.zeros((token.max() + 1, *chosen.shape[1:]))
    np.add.at(by_id, token, chosen)
    by_id = share(by_id, np.bincount(token)[:, None, None])
    counts = np.stack([np.bincount(token[domain == one], minlength=len(by_id)) for one in np.unique(domain)])
    load = np.einsum("dv,vle->dle", counts, by_id)
    load /= load.sum(axis=-1, keepdims=True)
    return np.abs(load - load.mean(axis=0)).sum(axis=-1) / 2


def print_curves(steps: Sequence[int], curves: Sequence[Sequence[Values]]) -> None:
    """Print mean and range over seeds of each measure at each step."""
    names = list(curves[0][0])
    print("\n| measure |", " | ".join(map(str, steps)), "|\n|---|" + "---|" * len(steps))
    for name in names:
        scale, digits = (1, 2) if name in ("loss", "MaxVio", "pair lift") else (100, 1)
        cells = []
        for place in range(len(steps)):
            seeds = [scale * float(curve[place][name]) for curve in curves if name in curve[place]]
            cells.append(f"{np.mean(seeds):.{digits}f} ± {(max(seeds) - min(seeds)) / 2:.{digits}f}" if seeds else "")
        print(f"| {name} |", " | ".join(cells), "|")


def print_contexts(traces: Sequence[RoutingTrace]) -> None:
    """Print, for each layer of the last traces, how far contexts of growing length decide the first expert."""
    print("\n| layer | context | contexts | share | by chance |\n|---|---|---|---|---|")
    for place, layer in enumerate(traces[0].info.layers):
        for name, ids in contexts(traces[0]).items():
            found = [measure_vocabulary(with_tokens(trace, ids)) for trace in traces]
            numbers = [[getattr(one.layers[place], part) for one in found] for part in ("mean", "chance")]
            cells = [f"{100 * np.mean(each):.1f} ± {50 * (max(each) - min(each)):.1f}" for each in numbers]
            print(f"| {layer} | {name} | {len(found[0].token)} |", " | ".join(cells), "|")


def contexts(trace: RoutingTrace) -> Mapping[str, np.ndarray]:
    """Return an id for each token by its character, by that and the one before, and by the word so far."""
    texts = [trace.text(int(token)) for token in trace.column("token")]
    pairs = [before + own for before, own in zip(["", *texts], texts, strict=False)]
    words, word = [], ""
    for text in texts:
        word = word + text if text.isalpha() else ""
        words.append(word or text)
    named = {"character": texts, "and the one before": pairs, "word so far": words}
    return {name: np.unique(keys, return_inverse=True)[1] for name, keys in named.items()}


def with_tokens(trace: RoutingTrace, ids: np.ndarray) -> RoutingTrace:
    """Return a trace with other ids of its tokens."""
    return trace_of(trace.info, replace(trace.rows(), token=ids))


def print_layers(analyses: Sequence[Analysis]) -> None:
    """Print the shift of each text by layer, from the last traces: of all texts, and of verse and prose alone."""
    print("\n| layer | text | shift | by characters alone | with the one before | by chance |")
    print("|---|---|---|---|---|---|")
    traces = [analysis.last.trace for analysis in analyses]
    for names, part in (("all texts", traces), ("verse or prose", [plays(trace) for trace in traces])):
        domains = [measure_domains(trace) for trace in part]
        pairs = [with_tokens(trace, contexts(trace)["and the one before"]) for trace in part]
        by_ids = [np.stack([shift_by_ids(trace) for trace in each]) for each in (part, pairs)]
        for place, layer in enumerate(traces[0].info.layers):
            for text, name in enumerate(domains[0][place].names):
                if names != "all texts" and text:
                    continue  # both have one shift
                numbers = [[one[place].shift[text] for one in domains], *(each[:, text, place] for each in by_ids)]
                numbers.append([one[place].chance[text] for one in domains])
                cells = [f"{100 * np.mean(each):.1f} ± {50 * np.ptp(each):.1f}" for each in numbers]
                print(f"| {layer} | {name if names == 'all texts' else names} |", " | ".join(cells), "|")


def print_groupings(analyses: Sequence[Analysis]) -> None:
    """Print for each layer how alike two seeds group the characters by main first expert: adjusted Rand index."""
    print("\n| layer | agreement of two seeds |\n|---|---|")
    for place, layer in enumerate(analyses[0].last.trace.info.layers):
        found = [analysis.last.vocabulary[0].layers[place].expert for analysis in analyses]
        pairs = [adjusted_rand(one, other) for index, one in enumerate(found) for other in found[:index]]
        print(f"| {layer} |", ", ".join(f"{value:.2f}" for value in pairs), "|")


def adjusted_rand(one: np.ndarray, other: np.ndarray) -> float:
    """Return the adjusted Rand index of two groupings: 1 if they are equal, 0 on average for unrelated ones.

    Source: Hubert and Arabie 1985, "Comparing partitions", eq. 5.
    """
    table = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(table, (one, other), 1)
    together, first, second, total = (
        float((counts * (counts - 1) / 2).sum())
        for counts in (table, table.sum(axis=1), table.sum(axis=0), np.array([len(one)]))
    )
    expected = first * second / total
    return (together - expected) / ((first + second) / 2 - expected)


def plays(trace: RoutingTrace) -> RoutingTrace:
    """Return the part of a trace that is not of the first text."""
    rows = trace.rows()
    kept = {name: column[rows.domain > 0] for name, column in rows.columns.items()}
    return trace_of(trace.info, TraceRows(**kept), trace.texts)


def draw(steps: Sequence[int], curves: Sequence[Sequence[Values]]) -> None:
    panels = (
        ("Texts: choices that differ, %", ("shift",), ("shift by characters", "shift by chance")),
        ("Tokens with their character's main first expert, %", ("input", "next"), ("input by chance",)),
        ("Experts of the last step, %", ("saturation",), ("saturation by chance",)),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    for own, (title, measured, levels) in zip(axes, panels, strict=True):
        for names, color in ((measured, None), (levels, _GRAY)):
            for style, name in zip(("-", "--"), names, strict=False):
                for seed, curve in enumerate(curves):
                    values = [100 * float(each[name]) if name in each else np.nan for each in curve]
                    label = name if seed == 0 else None
                    line = style if color is None else ":" if style == "-" else "-."
                    own.plot(steps, values, line, color=color or _COLORS[seed], label=label, linewidth=1.3)
        own.set_title(title, loc="left", fontsize=10)
        own.set(xlabel="step", xscale="log", ylim=(0, None))
        ticks = [step for step in steps if 2 * step <= steps[-1] or step == steps[-1]]  # the others are too near
        own.set_xticks(ticks, [str(step) for step in ticks], fontsize=8)
        own.minorticks_off()
        own.spines[["top", "right"]].set_visible(False)
        own.legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    if sys.argv[1] == "texts":
        write_texts(Path(sys.argv[2]))
    else:
        measure([Path(argument) for argument in sys.argv[2:]])
