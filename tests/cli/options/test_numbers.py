"""Numbers that no run could use are usage errors: one line, exit code 2, nothing done."""

from __future__ import annotations

import pytest

from layerpack.cli.main import main

NO_NUMBER, TOO_LARGE = "is not a finite number", "is more than any machine has"


@pytest.mark.parametrize(
    ("command", "option", "value", "words"),
    [
        ("plan", "--assume-link", "nan", NO_NUMBER),
        ("plan", "--assume-disk", "inf", NO_NUMBER),
        ("plan", "--assume-vram", "nan", "is not a size"),
        ("plan", "--assume-ram", "9" * 400, TOO_LARGE),
        ("plan", "--vram", "99999999TiB", TOO_LARGE),
        ("inspect", "--link", "nan", NO_NUMBER),
        ("inspect", "--disk", "1e999", NO_NUMBER),
        ("inspect", "--download", "nan", NO_NUMBER),
        ("inspect", "--link", "-1", "is not in the range x>0"),
        ("bench", "--row-seconds", "inf", NO_NUMBER),
        ("generate", "--temperature", "nan", NO_NUMBER),
        ("generate", "--temperature", "inf", NO_NUMBER),
        ("generate", "--top-p", "nan", NO_NUMBER),
        ("generate", "--top-p", "inf", "is not in the range 0<x<=1"),
        ("generate", "--seed", "9" * 23, "is not in the range 0<=x<=18446744073709551615"),
        ("generate", "--seed", "-1", "is not in the range 0<=x<=18446744073709551615"),
    ],
)
def test_a_useless_number_is_a_usage_error(
    command: str, option: str, value: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "nowhere", option, value])
    output = capsys.readouterr()
    assert (ended.value.code, output.out) == (2, "")
    assert f"'{option}'" in output.err and words in output.err.splitlines()[-1]
