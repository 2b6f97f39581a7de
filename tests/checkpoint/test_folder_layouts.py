"""Which files of a folder are read: those that transformers reads, with the same logits, or the reason why not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mtp_lightning.errors import MtpError
from tests.checkpoint.families import save_model
from tests.checkpoint.judge import TOKENS, edit, imported_logits, judged_logits
from tests.support.covering import some_of

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Tensors = dict[str, Tensor]


def tensors_of(folder: Path) -> Tensors:
    return safetensors.torch.load_file(folder / WHOLE)


def save(tensors: Tensors, path: Path) -> None:
    safetensors.torch.save_file({name: one.contiguous() for name, one in tensors.items()}, path, {"format": "pt"})


def change(folder: Path, how: Callable[[Tensors], Tensors]) -> None:
    save(how(tensors_of(folder)), folder / WHOLE)


def cut(folder: Path, *, variant: str = "", kept: bool = False, weight_map: dict[str, str] | None = None) -> None:
    """Divide the weights over two files with an index."""
    tensors = tensors_of(folder)
    names = [name.replace("model-", f"model{variant}-") for name in SHARDS]
    of = {name: names[place % 2] for place, name in enumerate(tensors)}
    for shard in names:
        save({name: one for name, one in tensors.items() if of[name] == shard}, folder / shard)
    index = INDEX.replace(".json", f"{variant}.json")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": of | (weight_map or {})}))
    if not kept:
        (folder / WHOLE).unlink()


def index_of(folder: Path, how: Callable[[dict[str, str]], dict[str, str]]) -> None:
    cut(folder)
    told = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(told | {"weight_map": how(told["weight_map"])}))


def stale(folder: Path) -> None:
    """A newer whole file beside shards of an older model."""
    cut(folder, kept=True)
    change(folder, lambda tensors: {name: 0.9 * one for name, one in tensors.items()})


def base_only(folder: Path) -> None:
    """As `AutoModel` saves a model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    model.model.save_pretrained(folder)


def unprefixed(tensors: Tensors, *beginnings: str) -> Tensors:
    return {name.removeprefix("model.") if name.startswith(beginnings) else name: one for name, one in tensors.items()}


def to_cache(folder: Path, *others: str, main: str | None = "abc") -> None:
    """As in the cache of the hub: links to blobs, in a snapshot."""
    cut(folder)
    snapshot, blobs = folder / "snapshots/abc", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    for other in others:
        (folder / "snapshots" / other).mkdir()
    if main is not None:
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(main)


def extra(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors | {name: torch.ones(shape or (2,))})


def cast(*dtypes: torch.dtype) -> Callable[[Path], None]:
    def casted(tensors: Tensors) -> Tensors:
        return {name: one.to(dtypes[place % len(dtypes)]) for place, (name, one) in enumerate(tensors.items())}

    return lambda folder: change(folder, casted)


def tied(how: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def tie(folder: Path) -> None:
        edit(folder, tie_word_embeddings=True)
        change(folder, how)

    return tie


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {other: one for other, one in tensors.items() if other != name}


def renamed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / WHOLE).rename(folder / name)  # type: ignore[return-value]


def replaced(name: str, content: bytes = b"GGUF") -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / WHOLE).unlink()
        (folder / name).write_bytes(content)

    return replace


def beside(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"x")  # type: ignore[return-value]


def as_folder(name: str) -> Callable[[Path], None]:
    def become(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return become


def bytes_of(how: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / WHOLE).write_bytes(how((folder / WHOLE).read_bytes()))  # type: ignore[return-value]


EMBEDDING, MATRIX = "model.embed_tokens.weight", "lm_head.weight"
RIGHT: dict[str, Callable[[Path], Any]] = {
    "one file": lambda folder: None,
    "shards": cut,
    "one file beside shards of an older model": stale,
    "one file beside an index of files that are gone": lambda folder: (
        cut(folder, kept=True),
        [(folder / name).unlink() for name in SHARDS],
    ),
    "one file beside an index that is none": beside(INDEX),
    "an index that lacks tensors": lambda folder: index_of(folder, lambda of: dict([*of.items()][:9])),
    "an index that names the other file": lambda folder: index_of(
        folder, lambda of: {name: SHARDS[place % 3 > 0] for place, name in enumerate(of)}
    ),
    "an index of a tensor that no file has": lambda folder: cut(folder, weight_map={"model.gone": SHARDS[0]}),
    "a file that no index names": lambda folder: (cut(folder), replaced_copy(folder, "model-x.safetensors")),
    "a model saved without its unembedding": base_only,
    "layers without a prefix": lambda folder: change(folder, lambda one: unprefixed(one, "model.layers.")),
    "nothing with a prefix": lambda folder: change(folder, lambda one: unprefixed(one, "model.")),
    "an entry of the cache": to_cache,
    "an entry of the cache without refs": lambda folder: to_cache(folder, main=None),
    "an entry of the cache at one of two": lambda folder: to_cache(folder, "abd"),
    "a linked folder": lambda folder: (
        folder.rename(folder.parent / "other"),
        folder.symlink_to(folder.parent / "other"),
    ),
    "the file of Mistral beside": lambda folder: replaced_copy(folder, "consolidated.safetensors"),
    "a pickle beside": beside("pytorch_model.bin"),
    "GGUF beside": beside("model-q4.gguf"),
    "frequencies stored": extra("model.rotary_emb.inv_freq"),
    "frequencies stored by layer": extra("model.layers.0.self_attn.rotary_emb.inv_freq"),
    "fp64": cast(torch.float64),
    "bf16": cast(torch.bfloat16),
    "fp16": cast(torch.float16),
    "three types": cast(torch.float32, torch.bfloat16, torch.float16),
    "four types": cast(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "tied and stored twice": tied(lambda one: one | {MATRIX: one[EMBEDDING].clone()}),
    "tied and stored once": tied(without(MATRIX)),
    "tied and stored as the unembedding": tied(without(EMBEDDING)),
    "tied by the settings alone": tied(lambda one: one),
}


def replaced_copy(folder: Path, name: str) -> None:
    source = next(folder.glob("model*.safetensors"))
    shutil.copy(source, folder / name)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an index of a file that is gone": (
        lambda folder: (cut(folder), (folder / SHARDS[1]).unlink()),
        f"no {SHARDS[1]}, with 15 tensors",
    ),
    "an index of nothing": (lambda folder: index_of(folder, lambda of: {}), "an empty weight_map"),
    "an index of a pickle": (
        lambda folder: index_of(folder, lambda of: of | {MATRIX: "pytorch_model.bin"}),
        "'pytorch_model.bin'",
    ),
    "an index of another folder's": (
        lambda folder: index_of(folder, lambda of: of | {MATRIX: "../model.safetensors"}),
        "'../model.safetensors'",
    ),
    "an index that is a folder": (
        lambda folder: (cut(folder), as_folder(INDEX)(folder), (folder / SHARDS[1]).unlink()),
        f"no {SHARDS[1]}",
    ),
    "settings alone": (lambda folder: (folder / WHOLE).unlink(), "none in"),
    "weights alone": (lambda folder: (folder / "config.json").unlink(), "neither in"),
    "a pickle": (replaced("pytorch_model.bin"), "a pickle can run any program"),
    "pickles with an index": (
        lambda folder: (
            replaced("pytorch_model-00001-of-00002.bin")(folder),
            beside("pytorch_model.bin.index.json")(folder),
        ),
        "a pickle can run any program",
    ),
    "GGUF": (replaced("llama-q4_0.gguf"), "llama-q4_0.gguf (GGUF"),
    "TensorFlow": (replaced("tf_model.h5"), "tf_model.h5 (TensorFlow)"),
    "Flax": (replaced("flax_model.msgpack"), "(Flax)"),
    "ONNX": (replaced("model.onnx"), "(ONNX)"),
    "Mistral's file alone": (renamed("consolidated.safetensors"), "Mistral's own names"),
    "two variants": (
        lambda folder: (replaced_copy(folder, "model.fp16.safetensors"), renamed("model.bf16.safetensors")(folder)),
        "--variant bf16",
    ),
    "a folder in place of the file": (as_folder(WHOLE), "a folder, a FIFO or a device in place of a file"),
    "a folder in place of the settings": (as_folder("config.json"), "neither in"),
    "a broken link": (
        lambda folder: ((folder / WHOLE).unlink(), (folder / WHOLE).symlink_to("gone")),
        "must be readable",
    ),
    "cut short": (bytes_of(lambda content: content[:-9]), "for shape"),
    "cut in the header": (bytes_of(lambda content: content[:99]), "a header of"),
    "an empty file": (bytes_of(lambda content: b""), "a header of 0 bytes at the beginning of 0"),
    "no safetensors": (bytes_of(lambda content: b"PK\x03\x04" + content), "a pickle of torch"),
    "a tensor in two files": (
        lambda folder: index_of(
            folder, lambda of: (replaced_copy(folder, "model-x.safetensors"), of | {"x": "model-x.safetensors"})[1]
        ),
        "must lie in one file whole",
    ),
    "two snapshots": (lambda folder: to_cache(folder, "abd", main=None), "abc, abd"),
    "refs of no snapshot": (lambda folder: to_cache(folder, "abd", main="gone"), "abc, abd"),
    "an unembedding missing": (lambda folder: change(folder, without(MATRIX)), f"1 missing: {MATRIX}"),
    "fp8": (
        lambda folder: change(folder, lambda one: one | {MATRIX: one[MATRIX].to(torch.float8_e4m3fn)}),
        "lm_head.weight of float8_e4m3fn",
    ),
    "whole numbers": (
        lambda folder: change(folder, lambda one: one | {MATRIX: one[MATRIX].to(torch.int8)}),
        "lm_head.weight of int8",
    ),
    "names of a compiled model": (
        lambda folder: change(folder, lambda one: {f"_orig_mod.{name}": value for name, value in one.items()}),
        "30 unexpected: _orig_mod.",
    ),
    "a classifier": (
        lambda folder: change(folder, lambda one: without(MATRIX)(one) | {"score.weight": torch.ones(2, 16)}),
        "1 unexpected: score.weight",
    ),
    "NaN": (
        lambda folder: change(folder, lambda one: one | {MATRIX: one[MATRIX].fill_(torch.nan)}),
        "208 NaN or infinite of the 208 values that unembedding.lm_heads.0.weight takes from lm_head.weight",
    ),
    "an adapter of a model elsewhere": (
        lambda folder: (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/model"})
        ),
        "'someone/model'",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "hf"
    save_model(transformers, "llama", folder)
    return folder


@pytest.mark.parametrize("case", some_of(RIGHT, one_in=4))
def test_what_transformers_reads_is_read_the_same(case: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(saved, folder)
    RIGHT[case](folder)
    opened = folder / "snapshots/abc" if (folder / "snapshots").exists() else folder
    expected = judged_logits(transformers, opened)
    torch.testing.assert_close(imported_logits(folder), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(saved, folder)
    change, found = REFUSED[case]
    change(folder)
    with pytest.raises(MtpError) as failure:
        imported_logits(folder)
    assert found in str(failure.value)
    assert all((failure.value.expected, failure.value.found, failure.value.hint))
    assert not [*tmp_path.glob("hf-ours*")]


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_variant_is_read_where_it_is_asked_for(is_cut: bool, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(saved, folder)
    if is_cut:
        cut(folder, variant=".fp16", kept=True)
    else:
        shutil.copy(folder / WHOLE, folder / "model.fp16.safetensors")
    change(folder, lambda tensors: {name: 0.5 * one for name, one in tensors.items()})
    expected = judged_logits(transformers, folder, variant="fp16")
    torch.testing.assert_close(imported_logits(folder, variant="fp16"), expected, rtol=1e-5, atol=1e-5)
    shutil.rmtree(tmp_path / "hf-ours")
    for name in ("bf16", "../hf/model", "*"):
        with pytest.raises(MtpError) as failure:
            imported_logits(folder, variant=name)
        assert "--variant" in str(failure.value)


@pytest.mark.parametrize("case", ["gpt_neox_tied", "qwen3"])
def test_a_model_without_its_unembedding_of_another_family(case: str, tmp_path: Path) -> None:
    save_model(transformers, case, tmp_path / "whole")
    transformers.AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "hf")
    assert not any(name.startswith(("model.", "gpt_neox.")) for name in tensors_of(tmp_path / "hf"))
    expected = judged_logits(transformers, tmp_path / "hf")
    torch.testing.assert_close(imported_logits(tmp_path / "hf"), expected, rtol=1e-5, atol=1e-5)


def test_the_tables_try_different_things(saved: Path) -> None:
    assert len(RIGHT) + len(REFUSED) >= 60
    assert judged_logits(transformers, saved).shape[:2] == TOKENS.shape
