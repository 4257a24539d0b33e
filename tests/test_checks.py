"""Checks of single settings and of whole configurations."""

from pathlib import Path

import pytest
from jsonargparse import Namespace

from vil_lightning.checks import (
    argument_types,
    check_betas,
    check_image_sizes,
    check_not_negative,
    check_positive,
    check_sections,
    check_shares,
    check_sizes,
    check_values,
)
from vil_lightning.data import Digits
from vil_lightning.errors import ConfigError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (check_positive, [1e-9, 1, None], [0, -1, NAN]),
        (check_not_negative, [0, 1, None], [-1e-9, NAN]),
        (check_shares, [0, 0.5, 1, None], [-0.1, 1.1, NAN]),
        (check_sizes, [1, 2**20, None], [0, -1, 2**20 + 1]),
        (check_image_sizes, [1, 2**14, None], [0, 2**14 + 1]),
    ],
)
def test_checks__bounds(check, good: list[float | None], bad: list[float]) -> None:  # type: ignore[no-untyped-def]
    for value in good:
        check("model", size=value)
    for value in bad:
        with pytest.raises(ConfigError, match=rf"^model\.size={value} must"):
            check("model", fine=None, size=value)


def test_check_betas__two_below_one() -> None:
    check_betas((0.0, 0.999))
    for betas in ((0.9, 1.0), (-0.1, 0.9), (0.9,), (NAN, 0.9)):
        with pytest.raises(ConfigError, match=r"model\.betas"):
            check_betas(betas)


def section(**arguments: object) -> Namespace:
    return Namespace(data=Namespace(class_path="vil_lightning.data.Digits", init_args=Namespace(**arguments)))


def test_check_values__what_can_be_passes() -> None:
    check_values(section(img_size=16, std=(0.1, 0.2, 0.3), seed=None, train_transform=None, anything=None))
    check_values({"trainer": Namespace(max_epochs=-1, callbacks=None, limit=1.0)})


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_check_values__numbers_that_are_none_at_any_depth(value: float) -> None:
    with pytest.raises(ConfigError, match=r"^data\.std=.* finite"):
        check_values(section(std=(0.1, value, 0.3)))
    with pytest.raises(ConfigError, match=r"^model\.backbone\.kwargs\.drop_path_rate="):
        check_values({"model": {"backbone": {"kwargs": {"drop_path_rate": value}}}})


def test_check_values__null_where_the_type_excludes_it() -> None:
    with pytest.raises(ConfigError, match=r"^data\.img_size is null"):
        check_values(section(img_size=None))
    with pytest.raises(ConfigError, match=r"^data\.repeats is null"):  # an argument of the class above
        check_values(section(repeats=None))


def test_check_values__a_number_for_a_section() -> None:
    model = {"class_path": "vil_lightning.methods.DINO", "init_args": {"backbone": 3.0}}
    with pytest.raises(ConfigError, match=r"^model\.backbone=3\.0 must be a section"):
        check_values({"model": model})


def test_argument_types__nearest_class_first() -> None:
    types = argument_types(Digits)
    assert types["num_workers"] is int
    assert types["classes"] == str | None


def test_check_sections__names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: {class_path: X, init_args: {train_transform: {class_path: Y, wings: 2, init_args: {}}}}")
    for args in (["--config", str(path)], [f"--config={path}"], ["-c", str(path)]):
        with pytest.raises(ConfigError, match=r"a\.yaml: data\.train_transform\.wings is not known"):
            check_sections(["fit", *args])
    path.write_text("data: {class_path: X, init_args: {}}\ncallbacks: [{class_path: Z}]")
    check_sections(["--config", str(path), "--config", "nowhere.yaml", "--config"])


def test_check_sections__an_overlay_without_class_and_what_is_no_section(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: {init_args: {batch_size: 4}, wings: 2}")
    with pytest.raises(ConfigError, match=r"a\.yaml: data\.wings is not known"):
        check_sections(["--config", str(path)])
    for value in (".inf", "3", "[many]"):  # which a later --trainer.max_epochs would replace without a word
        path.write_text(f"trainer: {value}")
        with pytest.raises(ConfigError, match=r"a\.yaml: trainer=.* must be a section"):
            check_sections(["--config", str(path)])
    for text in ("trainer: {max_epochs: 1}\ndata: Digits\n", "trainer: own.yaml", "trainer:", "- 1"):  # to the parser
        path.write_text(text)
        check_sections(["--config", str(path)])
