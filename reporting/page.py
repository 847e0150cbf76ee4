"""The report's page: every section through its template."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reporting.compared_runs import ComparedRuns
from reporting.sections import SECTIONS, Options
from training.runs import describe_run, readable_name


def render_report(runs: ComparedRuns, options: Options) -> str:
    """The report as one HTML page without links to other files. Raises UserError for queries that are no pairs."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections: list[dict[str, Any]] = []
    for name, (title, section) in SECTIONS.items():
        shown = section(runs, options)
        if shown is not None:
            sections.append({"name": name, "title": title, "shown": shown})
    dataset = runs.settings.dataset
    return environment.get_template("report.html").render(
        sections=sections,
        runs=[
            {"letter": letter, "name": readable_name(encoder.run), **describe_run(encoder.run)}
            for letter, encoder in zip(runs.letters, runs.encoders, strict=True)
        ],
        dataset=dataset.name or dataset.source,
        language=dataset.language,
        split=runs.split,
        pairs=len(runs.rows),
        images=len(runs.images),
    )
