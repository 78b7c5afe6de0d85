"""What serves is saved as it lies in memory, rank by rank, and another engine starts from it."""

from pathlib import Path

import pytest
import torch

from rollout import Engine, EngineBase, RolloutPool
from rollout.errors import CheckpointError, ConfigError, InvalidRequestError, RolloutError
from rollout.models.sharded_state import ShardedStateLoader

SMALL = {"num_threads": 1, "kv_cache_bytes": 4 << 20, "skip_tokenizer_init": True}
GREEDY = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint("qwen3", tie_word_embeddings=True)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_engine_starts_from_what_another_saved_after_an_update(tp_size, folder, tmp_path):
    options = {**SMALL, "tp_size": tp_size, "executor": "local"}
    with Engine(folder, **options) as engine:
        name = "model.layers.0.mlp.down_proj.weight"
        full = torch.full((64, len(engine.get_weights_by_name(name, 1)[0])), 0.125)
        engine.update_weights_from_tensor([(name, full)])
        served = engine.weights_fingerprint()
        expected = engine.generate(input_ids=[5, 9, 2], sampling_params=GREEDY)["output_ids"]
        assert engine.save_sharded_model(tmp_path / "saved", max_size=1 << 16) > 2 * tp_size
    with Engine(tmp_path / "saved", load_format="sharded_state", **options) as engine:
        assert engine.weights_fingerprint() == served
        got = engine.generate(input_ids=[5, 9, 2], sampling_params=GREEDY)["output_ids"]
        assert got == expected


def test_a_saved_state_is_never_written_over_and_no_partial_file_is_left(folder, tmp_path):
    with Engine(folder, **SMALL) as engine:
        assert engine.collective_rpc("save_sharded_model", path=tmp_path) == 1
        with pytest.raises(CheckpointError, match=r"got model-rank-0-part-0\.safetensors of an"):
            engine.save_sharded_model(tmp_path)
        assert not list(tmp_path.glob(".*"))
        # Another pattern is another save.
        assert engine.save_sharded_model(tmp_path, pattern="{rank}.{part}.safetensors") == 1


def test_it_is_the_ranks_of_one_size_that_start_from_it(folder, tmp_path):
    with Engine(folder, **SMALL) as engine:
        engine.save_sharded_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"tp_size 1, expected 2|part-0"):
        Engine(tmp_path, load_format="sharded_state", tp_size=2, executor="local", **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "state.safetensors"}, r"expected a file name with \{rank\} and \{part\}"),
        ({"pattern": "../{rank}-{part}"}, r"expected a file name"),
        ({"pattern": "{rank}-{part}-{host}"}, r"expected a file name"),
    ],
)
def test_a_pattern_that_names_too_little_is_refused(options, message, folder, tmp_path):
    with Engine(folder, **SMALL) as engine, pytest.raises(ConfigError, match=message):
        engine.save_sharded_model(tmp_path, **options)


def test_a_folder_that_cannot_be_written_is_an_error_of_this_call_alone(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with Engine(folder, **SMALL) as engine:
        with pytest.raises(CheckpointError, match="cannot write to"):
            engine.save_sharded_model(tmp_path / "file" / "saved")
        assert engine.generate(input_ids=[5], sampling_params=GREEDY)["output_ids"]


def test_weights_that_are_not_whole_are_not_saved(folder, tmp_path):
    with Engine(folder, load_format="dummy", await_first_update=True, **SMALL) as engine:
        with pytest.raises(RolloutError, match="cannot save weights: they are not whole"):
            engine.save_sharded_model(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_state_whose_parts_are_gone_says_which(folder, tmp_path):
    with Engine(folder, **SMALL) as engine:
        engine.save_sharded_model(tmp_path, max_size=1 << 16)
    (tmp_path / "model-rank-0-part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors.*save it again"):
        Engine(tmp_path, load_format="sharded_state", **SMALL)


def test_a_pool_saves_once_and_writes_one_profile(folder, tmp_path):
    with RolloutPool(folder, num_replicas=2, **SMALL) as pool:
        assert isinstance(pool, EngineBase)
        assert pool.save_sharded_model(tmp_path) == 1
        pool.start_profile()
        assert Path(pool.stop_profile()).is_file()


def test_by_name_only_what_ranks_carry_out_is_called(folder):
    with Engine(folder, **SMALL) as engine:
        with pytest.raises(InvalidRequestError, match=r"got 'shutdown', expected one of save_sh"):
            engine.collective_rpc("shutdown")
        engine.collective_rpc("flush_cache")


def test_a_part_needs_room(tmp_path):
    with pytest.raises(ConfigError, match="expected a positive number of bytes"):
        ShardedStateLoader.save_model(None, tmp_path, max_size=0)
