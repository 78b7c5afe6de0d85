"""TOML files and overrides become frozen dataclasses, or one error that lists every problem."""

from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from rollout.errors import ConfigError
from rollout.settings import default_of, load_settings


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    temperature: float = 1.0
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Engine:
    model_path: str
    num_threads: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads is {self.num_threads}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    engine: Engine = field(default_factory=lambda: Engine(model_path="tiny", num_threads=1))
    sampling: Sampling = field(default_factory=Sampling)
    fallback: Sampling | None = None
    num_steps: int = 10
    lr: float = 1e-3
    sizes: tuple[int, ...] = (1, 2)
    folder: Path | None = None
    shuffle: bool = False


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text)
    return path


def problems(path: Path | None, *overrides: str, cls: type = Settings) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(cls, path, overrides)
    return str(caught.value)


def test_without_a_file_and_overrides_the_defaults_of_the_class_hold():
    assert load_settings(Settings) == Settings()


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path):
    path = write(
        tmp_path, 'num_steps = 3\nfolder = "runs/a"\nsizes = [4, 8]\n[engine]\ndevice = "cpu"\n'
    )
    got = load_settings(Settings, path)
    # `model_path` and `num_threads` are those of the outer default, not of the class `Engine`.
    assert got.engine == Engine(model_path="tiny", num_threads=1, device="cpu")
    assert (got.num_steps, got.sizes, got.folder) == (3, (4, 8), Path("runs/a"))
    assert got.lr == Settings().lr


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(tmp_path):
    path = write(tmp_path, "num_steps = 3\nlr = 0.5\n")
    got = load_settings(Settings, path, ["num_steps=4", "num_steps=5", "sampling.temperature=0"])
    assert (got.num_steps, got.lr, got.sampling.temperature) == (5, 0.5, 0.0)


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("engine.device=cpu", "device", "cpu"),
        ("engine.device = 'cuda'", "device", "cuda"),
        ('engine.model_path="a = b"', "model_path", "a = b"),
        ("engine.model_path=/models/a=b", "model_path", "/models/a=b"),
    ],
)
def test_a_bare_word_is_a_string_and_quotes_are_allowed(override, key, expected):
    assert getattr(load_settings(Settings, None, [override]).engine, key) == expected


def test_tables_and_lists_are_values_too():
    got = load_settings(Settings, None, ["sampling.logit_bias={5=1.5}", 'sampling.stop=["a", "b"]'])
    assert got.sampling == Sampling(logit_bias={5: 1.5}, stop=["a", "b"])
    assert load_settings(Settings, None, ["engine={device='cpu'}"]).engine.num_threads == 1


def test_an_optional_section_is_built_from_its_own_defaults():
    assert load_settings(Settings, None, ["fallback.temperature=0.5"]).fallback == Sampling(
        temperature=0.5
    )


def test_the_result_is_frozen():
    with pytest.raises(FrozenInstanceError):
        load_settings(Settings).num_steps = 1


def test_an_unknown_key_names_the_nearest_one_and_the_file(tmp_path):
    path = write(tmp_path, "num_stepz = 3\n")
    assert problems(path) == f"{path}: unknown key 'num_stepz'; did you mean 'num_steps'?"


def test_an_unknown_key_in_a_section_names_the_nearest_one_there():
    message = problems(None, "sampling.temprature=1")
    assert "unknown key 'sampling.temprature'" in message
    assert "did you mean 'sampling.temperature'?" in message


def test_a_key_that_belongs_into_a_section_is_found_there():
    assert "did you mean 'sampling.temperature'?" in problems(None, "temperature=1")


def test_a_key_like_no_other_lists_the_known_ones():
    message = problems(None, "zzz=1")
    assert all(key in message for key in ("num_steps", "engine", "lr"))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("num_steps=many", ("'num_steps' is 'many'", "int")),
        ("num_steps=1.5", ("'num_steps' is 1.5", "int")),
        ("num_steps=true", ("'num_steps' is True", "int")),
        ("shuffle=1", ("'shuffle' is 1", "bool")),
        ("shuffle=True", ("'shuffle' is 'True'", "bool")),
        ("engine.device=tpu", ("'engine.device' is 'tpu'", "'auto', 'cpu', 'cuda'")),
        ("engine=3", ("'engine' is a section", "model_path")),
        ("engine.num_threads=0", ("engine", "expected at least 1")),
        ("folder=3", ("'folder' is 3", "Path")),
        ("sizes=[1, 'a']", ("'sizes'", "int")),
        ("sizes=[1", ("'[1' is not a TOML value",)),
        ("lr", ("expected key=value",)),
        ("=1", ("expected key=value",)),
        ("engine..device=cpu", ("expected key=value",)),
        ("lr=", ("not a TOML value",)),
    ],
)
def test_a_wrong_value_says_what_got_and_expected(override, parts):
    message = problems(None, override)
    assert all(part in message for part in parts), message


def test_all_problems_are_one_error(tmp_path):
    path = write(tmp_path, "num_stepz = 3\nlr = 'x'\n")
    lines = problems(path, "shuffel=true", "engine.device=tpu").splitlines()
    assert len(lines) == 4


def test_a_required_key_that_nobody_sets_is_named():
    assert "'model_path' of Engine is not set" in problems(None, cls=Engine)
    assert load_settings(Engine, None, ["model_path=a"]) == Engine(model_path="a")


def test_a_file_that_is_missing_or_broken_is_named(tmp_path):
    assert "missing.toml" in problems(tmp_path / "missing.toml")
    path = write(tmp_path, "a = \n")
    assert f"{path} is not valid TOML" in problems(path)


def test_the_default_of_a_key_is_read_from_the_class():
    assert default_of(Settings, "num_steps") == 10
    assert default_of(Sampling, "temperature") == 1.0
    assert default_of(Settings, "engine") == Engine(model_path="tiny", num_threads=1)
    with pytest.raises(KeyError, match="model_path"):
        default_of(Engine, "model_path")
