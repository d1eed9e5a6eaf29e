"""What counts as sample data, what is filled in, and what every refusal says."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from optimizer.errors import CalibrationError
from optimizer.samples import InputSpec, check_feed, load_samples, valid_tokens

INT64, FLOAT = np.dtype(np.int64), np.dtype(np.float32)
IDS = InputSpec("input_ids", INT64, ("batch", "sequence"), vocab=50)
MASK = InputSpec("attention_mask", INT64, ("batch", "total"))
POSITIONS = InputSpec("position_ids", INT64, ("batch", "sequence"))
PASTS = tuple(
    InputSpec(f"past_key_values.0.{t}", FLOAT, ("batch", 2, "past", 8)) for t in ("key", "value")
)
IMAGE = InputSpec("pixel_values", FLOAT, ("batch", 3, 4, 4))


def ids(count: int = 5, length: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, (count, length))


def only(spec, inputs=(IDS,), **options):
    return list(load_samples(spec, inputs, **options).iterate(1))


def yielding():
    for row in ids(3):
        yield {"input_ids": row[None]}


class TestSources:
    def test_a_file_holds_samples_stacked_along_the_first_axis(self, tmp_path):
        path = tmp_path / "data.npz"
        np.savez(path, input_ids=ids())
        samples = load_samples(path, [IDS])
        assert samples.count == 5
        assert (
            np.concatenate([b["input_ids"] for b in samples.batches()]).tolist() == ids().tolist()
        )

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_compressed_and_plain_files_read_the_same(self, tmp_path, save):
        save(tmp_path / "data.npz", input_ids=np.asfortranarray(ids()), valid=ids() > 9)
        (batch,) = load_samples(str(tmp_path / "data.npz"), [IDS]).iterate(8)
        assert batch.feed["input_ids"].tolist() == ids().tolist()
        assert batch.extras["valid"].tolist() == (ids() > 9).tolist()

    def test_a_large_plain_file_is_not_read_into_memory(self, tmp_path):
        path = tmp_path / "images.npz"
        np.savez(path, pixel_values=np.zeros((4000, 3, 16, 16), np.float32))
        spec = InputSpec("pixel_values", FLOAT, ("batch", 3, 16, 16))
        tracemalloc.start()
        load_samples(path, [spec])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < path.stat().st_size / 10

    def test_arrays_with_one_axis_more_are_stacks_of_whole_feeds(self):
        samples = load_samples({"input_ids": ids(6).reshape(3, 2, 6)}, [IDS])
        assert [b["input_ids"].shape for b in samples.batches()] == [(2, 6)] * 3

    def test_a_folder_holds_one_file_per_feed(self, tmp_path):
        for i, row in enumerate(ids(3)):
            np.savez(tmp_path / f"{i}.npz", input_ids=row[None, : 4 + i])
        shapes = [b["input_ids"].shape for b in load_samples(tmp_path, [IDS]).batches(4)]
        assert shapes == [(1, 4), (1, 5), (1, 6)]

    def test_a_function_is_called_once_per_pass_over_the_data(self, tmp_path, monkeypatch):
        (tmp_path / "my_samples.py").write_text(
            "import numpy as np\n"
            "calls = []\n"
            "def make():\n"
            "    calls.append(1)\n"
            "    yield {'input_ids': np.ones((1, 3), np.int64)}\n"
        )
        monkeypatch.chdir(tmp_path)
        for spec in ("my_samples:make", f"{tmp_path / 'my_samples.py'}:make"):
            samples = load_samples(spec, [IDS])
            assert [len(list(samples.batches())), len(list(samples.batches()))] == [1, 1]

    def test_callables_iterables_and_mappings_are_taken_as_they_are(self):
        rows = [{"input_ids": row[None]} for row in ids(3)]
        digests = {
            load_samples(spec, [IDS]).digest()
            for spec in (yielding, rows, iter(rows), {"input_ids": ids(3)})
        }
        assert len(digests) == 1


class TestBatches:
    def test_only_samples_of_equal_shape_share_a_batch(self):
        rows = [{"input_ids": np.ones((1, n), np.int64)} for n in (3, 3, 4, 4, 4, 3)]
        samples = load_samples(rows, [IDS])
        assert [b["input_ids"].shape for b in samples.batches(2)] == [
            (2, 3),
            (2, 4),
            (1, 4),
            (1, 3),
        ]

    def test_a_fixed_batch_size_is_kept_and_the_rest_filled_up(self):
        spec = InputSpec("input_ids", INT64, (4, "sequence"), vocab=50)
        shapes = [
            b["input_ids"].shape for b in load_samples({"input_ids": ids(6)}, [spec]).batches(1)
        ]
        assert shapes == [(4, 6), (4, 6)]

    def test_the_limit_counts_samples(self):
        assert load_samples({"input_ids": ids()}, [IDS], limit=2).count == 2
        assert load_samples({"input_ids": ids()}, [IDS]).limited(3).count == 3

    def test_digest_depends_on_every_value(self):
        changed = ids()
        changed[-1, -1] ^= 1
        digests = [load_samples({"input_ids": a}, [IDS]).digest() for a in (ids(), ids(), changed)]
        assert digests[0] == digests[1] != digests[2]


class TestFilledIn:
    def test_a_missing_cache_is_empty_and_masks_and_positions_follow(self):
        (sample, *_) = only({"input_ids": ids()}, (IDS, MASK, POSITIONS, *PASTS))
        assert sample.feed["past_key_values.0.key"].shape == (1, 2, 0, 8)
        assert sample.feed["attention_mask"].tolist() == [[1] * 6]
        assert sample.feed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]

    def test_masks_and_positions_continue_behind_a_given_cache(self):
        cache = np.zeros((1, 2, 3, 8), np.float32)
        data = [{"input_ids": ids(1), **{s.name: cache for s in PASTS}}]
        (sample,) = only(data, (IDS, MASK, POSITIONS, *PASTS))
        assert sample.feed["attention_mask"].shape == (1, 9)
        assert sample.feed["position_ids"].tolist() == [[3, 4, 5, 6, 7, 8]]

    def test_positions_count_from_the_first_token_that_is_not_padding(self):
        data = {"input_ids": ids(1), "attention_mask": np.array([[0, 0, 1, 1, 1, 1]])}
        (sample,) = only(data, (IDS, MASK, POSITIONS))
        assert sample.feed["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3]]

    def test_token_types_are_zero(self):
        types = InputSpec("token_type_ids", INT64, ("batch", "sequence"))
        assert not only({"input_ids": ids(1)}, (IDS, types))[0].feed["token_type_ids"].any()

    def test_what_is_filled_in_is_announced_once(self, caplog):
        with caplog.at_level("INFO"):
            load_samples({"input_ids": ids()}, [IDS, MASK]).bind([IDS, MASK, POSITIONS])
        assert [r.getMessage() for r in caplog.records] == [
            "--calibration: filled in attention_mask, which the data lacks"
        ]

    def test_images_that_nobody_scaled_are_pointed_out(self, caplog):
        image = np.full((2, 3, 4, 4), 200, np.float32)
        load_samples({"pixel_values": image}, [IMAGE])
        assert "'pixel_values' holds values from 0 up to 255" in caplog.text
        caplog.clear()
        load_samples({"pixel_values": image / 255}, [IMAGE])
        assert not caplog.text

    def test_int32_ids_fit_an_int64_input(self):
        assert only({"input_ids": ids().astype(np.int32)})[0].feed["input_ids"].dtype == INT64

    def test_other_arrays_are_kept_aside_and_stacked_like_the_feed(self):
        data = {"input_ids": ids(), "valid": ids() > 9, "labels": np.arange(5), "note": np.array(1)}
        samples = load_samples(data, [IDS])
        assert samples.extras == ("valid", "labels")
        assert [b.extras["labels"].tolist() for b in samples.iterate(3)] == [[0, 1, 2], [3, 4]]

    def test_samples_can_be_bound_to_another_model(self):
        samples = load_samples({"input_ids": ids()}, [IDS, MASK])
        bound = samples.bind([IDS, *PASTS])
        assert bound.input_names == (
            "input_ids",
            "past_key_values.0.key",
            "past_key_values.0.value",
        )
        assert bound.count == 5


def nan_image() -> np.ndarray:
    image = np.zeros((2, 3, 4, 4), np.float32)
    image[1, 0, 0, 0] = np.nan
    return image


#: data, inputs, everything the message must say
REFUSED = {
    "unknown vocabulary entry": (
        {"input_ids": ids() + 7},
        [IDS],
        ["sample", "'input_ids'", "token id 5", "0..49", "tokenizer"],
    ),
    "negative id": ({"input_ids": ids() - 100}, [IDS], ["'input_ids'", "token id -", "0..49"]),
    "misspelt name": ({"input_id": ids()}, [IDS], ["input_id", "input_ids"]),
    "misspelt beside a right one": (
        {"input_ids": ids(), "attention_masks": ids()},
        [IDS, MASK],
        ["'attention_masks'", "did you mean 'attention_mask'?"],
    ),
    "missing input": (
        {"input_ids": ids()},
        [IDS, IMAGE],
        ["'pixel_values' is missing", "input_ids"],
    ),
    "float ids": ({"input_ids": ids() * 1.0}, [IDS], ["float64", "expects int64"]),
    "raw pixels": (
        {"pixel_values": np.zeros((2, 3, 4, 4), np.uint8)},
        [IMAGE],
        ["uint8", "expects float32", "preprocessing"],
    ),
    "wrong rank": (
        [{"pixel_values": np.zeros((4, 4), np.float32)}],
        [IMAGE],
        ["2 axes [4, 4]", "expects 4", "[batch, 3, 4, 4]"],
    ),
    "wrong size": (
        {"pixel_values": np.zeros((2, 1, 4, 4), np.float32)},
        [IMAGE],
        ["[1, 1, 4, 4]", "axis 1 must be 3"],
    ),
    "NaN": ({"pixel_values": nan_image()}, [IMAGE], ["sample 1", "1 NaN or infinite"]),
    "different counts": (
        {"input_ids": ids(5), "attention_mask": ids(4)},
        [IDS, MASK],
        ["input_ids: 5", "attention_mask: 4"],
    ),
    "no samples": ({"input_ids": ids(0)}, [IDS], ["no samples", "at least one"]),
    "empty iterable": ([], [IDS], ["no samples"]),
    "not dicts": ([ids()], [IDS], ["sample 0", "ndarray", "dict"]),
    "no such file": (
        "nowhere.npz",
        [IDS],
        ["'nowhere.npz' does not exist", ".npz", "module:function"],
    ),
    "no such module": ("no_module_here:f", [IDS], ["no_module_here:f", "importable"]),
    "no such function": ("json:nothing", [IDS], ["'json'", "no function 'nothing'"]),
    "not a source": (3, [IDS], ["int"]),
    "function that yields nothing iterable": (lambda: 3, [IDS], ["iterable of dicts"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_and_says_what_was_found_and_expected(case):
    data, inputs, words = REFUSED[case]
    with pytest.raises(CalibrationError) as error:
        load_samples(data, inputs)
    message = str(error.value)
    assert message.startswith("--calibration: ")
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut off"])
def test_refuses_a_damaged_file(tmp_path: Path, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"--eval: .*data\.npz cannot be read as \.npz"):
        load_samples(path, [IDS], option="--eval")


def test_refuses_pickled_objects(tmp_path):
    np.savez(tmp_path / "data.npz", input_ids=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_samples(tmp_path / "data.npz", [IDS])


def test_refuses_an_empty_folder_and_a_limit_of_zero(tmp_path):
    with pytest.raises(CalibrationError, match=r"holds no \.npz files"):
        load_samples(tmp_path, [IDS])
    with pytest.raises(CalibrationError, match="0 samples requested"):
        load_samples({"input_ids": ids()}, [IDS], limit=0)


class TestFeeds:
    def test_valid_tokens_are_the_last_columns_of_the_mask(self):
        mask = np.array([[1, 1, 1, 1], [1, 1, 0, 1]])
        assert valid_tokens({"attention_mask": mask}, 2).tolist() == [[True, True], [False, True]]

    @pytest.mark.parametrize(
        "mask", [np.ones((2, 4)), np.ones((2, 1, 4, 4)), np.zeros((2, 1))], ids=str
    )
    def test_no_usable_mask_means_all_valid(self, mask):
        assert valid_tokens({"attention_mask": mask}, 2) is None
        assert valid_tokens({}, 2) is None

    @pytest.mark.parametrize(
        ("feed", "words"),
        [
            ({}, "'input_ids' is missing"),
            ({"input_ids": ids(), "x": ids()}, "'x' is not an input"),
            ({"input_ids": ids().astype(np.int32)}, "int32, the model expects int64"),
            ({"input_ids": ids()[0]}, "1 axes"),
        ],
    )
    def test_a_feed_has_to_match_exactly(self, feed, words):
        with pytest.raises(CalibrationError, match=words):
            check_feed(feed, [IDS], "feed")
