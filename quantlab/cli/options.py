"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from quantlab.cli.output import Format

Device = Annotated[str, Option("--device", help="auto, cpu, cuda or cuda:N.")]
Revision = Annotated[str | None, Option("--revision", help="Branch, tag or commit on the hub.", show_default=False)]
BaselineRevision = Annotated[
    str | None, Option("--baseline-revision", help="Branch, tag or commit of the baseline.", show_default=False)
]
RemoteCode = Annotated[bool, Option("--trust-remote-code", help="Run the Python files that come with the model.")]
OutputFormat = Annotated[Format, Option("--format", help="human or json.")]
