"""Names are text, whatever brackets and colons stand in them."""

import pytest
from rich.table import Table

from lightning_gsq.system.console import make_console


@pytest.mark.parametrize("name", ["run[/2]", "model[bold]", "[v2]", "a:smile:b", "[link=http://x]y[/link]", "x\\[y"])
def test_names_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console()
    console.print(name)
    table = Table(name, title=name)
    table.add_row(name)
    console.print(table)
    assert capsys.readouterr().out.count(name) == 4


def test_errors_go_where_errors_go(capsys: pytest.CaptureFixture[str]) -> None:
    make_console(stderr=True).print("[a]")
    make_console(quiet=True).print("[b]")
    output = capsys.readouterr()
    assert output.err == "[a]\n" and output.out == ""
