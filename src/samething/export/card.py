"""What a model folder says of itself: config.json and the card."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2

import samething
from samething.evaluation import EvaluationResult
from samething.evaluation.no_match import NoMatch
from samething.export.embedding_model import Source
from samething.export.form import Form
from samething.export.quality import Parity
from samething.files import Json
from samething.heads import Head
from samething.retrieval.codes import bytes_per_vector
from samething.training.run import Run

CODE_LICENCE: Final = "Apache-2.0"
_HUB_LICENCES: Final = {"apache-2.0": "apache-2.0", "mit": "mit", "cc-by-nc-4.0": "cc-by-nc-4.0"}
"""Licences that the hub knows by name, in its spelling."""


def configuration(
    name: str,
    source: Source,
    head: Head,
    form: Form,
    result: EvaluationResult | None,
    parity: Parity | None,
    no_match: NoMatch | None,
) -> dict[str, Json]:
    """Everything that is known of a model, as plain JSON values; its head may be a prefix of the source's."""
    packages = ("torch", "timm", "onnx", "numpy", "pillow")
    return {
        "name": name,
        "embedding_dim": head.embedding_dim,
        "form": form.to_json(),
        "backbone": {**source.backbone.metadata(), "licence": source.backbone.licence},
        "head": dataclasses.asdict(head.config),
        "training": _training(source.run, source) if source.run else None,
        "metrics": result.to_json() if result else None,
        "intervals": result.intervals() if result else None,
        "parity": parity.to_json() if parity else None,
        "calibration": no_match.fitted.to_json() if no_match else None,
        "no_match": no_match.to_json() if no_match else None,
        "licences": {"backbone": source.backbone.licence, "code": CODE_LICENCE},
        "versions": {
            "samething": samething.__version__,
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def _training(run: Run, source: Source) -> dict[str, Json]:
    catalog = source.features.catalog
    trained = catalog.take(catalog.has_role("train"))
    return {
        "config": run.config.to_json(),
        "finetune": run.manifest.content.get("finetune"),
        "datasets": sorted(set(trained.strings("dataset"))),
        "domains": trained.domains,
        "num_classes": run.manifest.content["num_classes"],
        # runs of version 0.1 say pictures
        "num_images": run.manifest.content.get("num_images", run.manifest.content.get("num_pictures")),
        "best_validation_mmp@5": run.best_score,
        "mix": dict(source.mix) if source.mix else None,
    }


def card(config: Mapping[str, Json]) -> str:
    """The model card in Markdown; for the hub with the header that it reads."""

    def percent(value: float | None, interval: Sequence[float | None]) -> str:
        low, high = interval
        if value is None or low is None or high is None:
            return "–"
        return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    templates = jinja2.Environment(loader=jinja2.PackageLoader("samething"), keep_trailing_newline=True)
    text = templates.get_template("model_card.md").render(
        **config,
        percent=percent,
        vector_bytes=bytes_per_vector(config["embedding_dim"], config["form"]["codes"]),
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    return (
        _hub_header(config) if config["form"]["format"] in ("hub", "sentence-transformers") else ""
    ) + text


def _hub_header(config: Mapping[str, Json]) -> str:
    """The YAML header of a card on the Hugging Face hub."""
    licence = str(config["backbone"]["licence"])
    known = _HUB_LICENCES.get(licence.lower())
    library = "sentence-transformers" if config["form"]["format"] == "sentence-transformers" else "samething"
    header: dict[str, Any] = {
        "license": known or "other",
        **({} if known else {"license_name": licence.lower().replace(" ", "-")}),
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-retrieval", "instance-retrieval", "image-embedding", "onnx"],
    }
    lines = ["---"]
    for key, value in header.items():
        lines += (
            [f"{key}:", *(f"- {item}" for item in value)] if isinstance(value, list) else [f"{key}: {value}"]
        )
    return "\n".join([*lines, "---", "", ""])
