"""The pictures of docs/architecture.md as Mermaid, which GitHub draws, read from the code."""

from __future__ import annotations

from scripts import import_graph

FACADE = {import_graph.PACKAGE, "__main__"}
"""Entry points of two lines each."""


def mermaid(lines: list[str], kind: str = "flowchart TD") -> str:
    return "\n".join(["```mermaid", kind, *(f"    {line}" for line in lines), "```"])


def packages() -> str:
    """The packages by layer. An arrow leads from who imports to what is imported; arrows that follow from others are left out."""
    (_, lowest), *layers = import_graph.LAYERS
    hidden = lowest | FACADE
    edges = {name: targets - hidden for name, targets in import_graph.graph().items() if name not in hidden}
    lines = []
    for number, (title, names) in reversed(list(enumerate(layers))):
        lines += [f'subgraph layer{number}["{title}"]', *(f"    {name}" for name in sorted(names - hidden)), "end"]
    for name, targets in import_graph.reduced(edges).items():
        lines += [f"{name} --> {target}" for target in sorted(targets)]
    lines += [f'base["everything may import:<br>{", ".join(sorted(lowest))}"]', "layer0 --> base"]
    return mermaid(lines)


def data_flow() -> str:
    """What a run hands from stage to stage, and what it leaves in its folder."""
    from compress.runs import STAGES

    results = {
        "baseline": "dense model, accuracy",
        "prune": "pruned model, plan",
        "finetune": "fine-tuned model",
        "quantize": "fake-quantized model, grids",
        "export": "ONNX files",
        "build": "engines",
        "measure": "latency and accuracy<br>of each file on each runtime",
        "report": "report.json, report.html,<br>model card, manifest.json",
    }
    lines = ["request --> workload", "checkpoint --> workload", "images --> workload", f"workload --> {STAGES[0]}"]
    for stage, following in zip(STAGES, (*STAGES[1:], None), strict=True):
        lines.append(f'{stage}["<b>{stage}</b><br>{results[stage]}"]')
        if following:
            lines.append(f"{stage} --> {following}")
    return mermaid(lines, "flowchart LR")
