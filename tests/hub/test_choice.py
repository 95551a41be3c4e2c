"""Which files of a repository are taken, by their names."""

from __future__ import annotations

import pytest

from bdprune.hub.choice import Choice, chosen, is_index

SHARDS = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
PICKLES = [f"pytorch_model-0000{part}-of-00002.bin" for part in (1, 2)]


def left(choice: Choice, possible: bool) -> list[str]:
    return sorted(path for (_, may), paths in choice.skipped.items() if may == possible for path in paths)


@pytest.mark.parametrize(
    ("safe", "pickled"),
    [
        ("model.safetensors", "pytorch_model.bin"),
        ("model.fp16.safetensors", "pytorch_model.fp16.bin"),
        ("a/open_clip_model.safetensors", "a/open_clip_pytorch_model.bin"),
        ("best.safetensors", "best.pth"),
        ("best.SafeTensors", "best.PTH"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ],
)
def test_the_safetensors_form_is_taken_and_the_pickle_is_named(safe: str, pickled: str) -> None:
    choice = chosen([safe, pickled], "")
    assert choice.files == [safe] and left(choice, True) == [pickled]
    ((reason, _),) = choice.skipped
    assert safe.rpartition("/")[2] in reason


def test_shards_count_as_one_form() -> None:
    paths = [*SHARDS, "model.safetensors.index.json", *PICKLES, "pytorch_model.bin.index.json"]
    choice = chosen(paths, "")
    assert choice.files == [*SHARDS, "model.safetensors.index.json"]
    assert left(choice, True) == sorted([*PICKLES, "pytorch_model.bin.index.json"])


def test_other_models_and_other_folders_are_no_other_form() -> None:
    paths = ["model.safetensors", "ema.bin", "sub/pytorch_model.bin", "sub/model.PTH"]
    assert chosen(paths, "").files == paths


@pytest.mark.parametrize(
    "path", ["a.onnx", "tf_model.h5", "flax_model.msgpack", "m.GGUF", "x.tar.gz", "weights", "a.xyz", "../evil.bin"]
)
def test_what_may_hold_weights_is_named_as_such(path: str) -> None:
    choice = chosen([path, "model.safetensors"], "")
    assert choice.files == ["model.safetensors"] and left(choice, True) == [path]


@pytest.mark.parametrize(
    "path", ["README.md", "LICENSE", ".gitattributes", "config.json", "a/b.py", "x.PNG", "events.out.tfevents.1.host"]
)
def test_text_and_pictures_are_left_out(path: str) -> None:
    choice = chosen([path, "model.safetensors"], "")
    assert choice.files == ["model.safetensors"] and left(choice, False) == [path] and not left(choice, True)


def test_a_file_that_is_named_is_taken_whatever_it_is() -> None:
    paths = ["model.safetensors", "pytorch_model.bin", "odd", "[x].bin"]
    for path in paths:
        assert chosen(paths, path).files == [path] and not chosen(paths, path).skipped


def test_a_pattern_takes_all_forms_of_the_checkpoints_that_it_matches() -> None:
    paths = ["a.safetensors", "a.bin", "b/a.bin", "b/c/a.bin", "b/c/notes.md"]
    assert chosen(paths, "*").files == ["a.safetensors", "a.bin"]
    assert chosen(paths, "*.bin").files == ["a.bin"]
    assert chosen(paths, "b/*/*").files == ["b/c/a.bin"]
    assert chosen(paths, "**/*.bin").files == ["a.bin", "b/a.bin", "b/c/a.bin"]
    assert chosen(paths, "**").files == paths[:4]
    assert chosen(paths, "A.bin").files == []


def test_indices_are_known_by_name() -> None:
    assert is_index("a/model.safetensors.index.json") and is_index("pytorch_model.bin.index.json")
    assert not is_index("model_index.json") and not is_index("faiss.index.json")
