"""The files in `configs/` are valid, and those that say they are the defaults are."""

from rollout.cli.generate import GenerateSettings
from rollout.cli.options import as_toml
from rollout.settings import load_settings
from rollout_benchmarks.settings import BenchSettings
from trainers_integration.demo.config import DemoConfig

SCHEMAS = {"bench": BenchSettings, "demo": DemoConfig, "generate": GenerateSettings}


def test_every_file_belongs_to_a_command(checkout):
    names = {path.stem.partition("-")[0] for path in (checkout / "configs").glob("*.toml")}
    assert names == set(SCHEMAS)


def test_every_file_loads(checkout):
    for path in sorted((checkout / "configs").glob("*.toml")):
        command = path.stem.partition("-")[0]
        # A model is the one thing that only the user can name.
        model = ["engine.model_path=PATH"] if command == "generate" else []
        load_settings(SCHEMAS[command], path, model)


def test_the_demo_runs_with_what_its_file_says(checkout):
    assert load_settings(DemoConfig, checkout / "configs" / "demo.toml") == DemoConfig()


def test_the_file_of_the_benchmarks_says_their_defaults(checkout):
    assert load_settings(BenchSettings, checkout / "configs" / "bench.toml") == BenchSettings()


def test_the_demo_file_is_what_print_config_prints(checkout):
    text = (checkout / "configs" / "demo.toml").read_text()
    header, _, body = text.partition("\n\n")
    assert all(line.startswith("#") for line in header.splitlines())
    again = "rollout demo --print-config, below the first paragraph of the file"
    assert body.strip() == as_toml(DemoConfig()).strip(), f"write it anew: {again}"
