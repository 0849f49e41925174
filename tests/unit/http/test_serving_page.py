"""The tables of docs/serving.md are what the code has."""

from pathlib import Path

from pydantic_core import PydanticUndefined

from common.config.erasure import ErasurePolicy
from rollout_server.http.server.settings import ServerSettings
from tests.stub_replica import StubReplica, StubServer, saying

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
MANY = "see below"


def setting_rows() -> list[str]:
    rows = []
    for name, field in ServerSettings.model_fields.items():
        default = field.default
        if default is PydanticUndefined:
            shown = "must be given"
        elif default is None or default == ():
            shown = ""
        elif isinstance(default, ErasurePolicy):
            shown = MANY
        else:
            shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
        rows.append(f"| `--{name.replace('_', '-')}` | {shown} | {field.description} |")
    return rows


def metric_rows() -> list[str]:
    server = StubServer(StubReplica(saying("a")))
    rows = []
    for metric in server.service.metrics.registry.collect():
        name = metric.name + ("_total" if metric.type == "counter" else "")
        rows.append(f"| `{name}` | {metric.type} | {metric.documentation} |")
    return rows


def rows_below(heading: str) -> list[str]:
    section = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| `")]


def test_the_page_lists_all_settings() -> None:
    assert rows_below("Settings") == setting_rows()


def test_the_page_lists_all_metrics() -> None:
    assert rows_below("Metrics") == metric_rows()
