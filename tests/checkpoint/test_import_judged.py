"""transformers as the judge of import and export: the same logits, and the same folder again."""

import json
from itertools import product

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.format.carried_files import SOURCE_CONFIG
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.decode import generate
from tests.checkpoint.families import CASES, save_model
from tests.checkpoint.foreign import WIDTH, llama_tensors, module_tensors, write_folder
from tests.checkpoint.runs import assert_same_tensors, stored
from tests.support.covering import some_of

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
NUM_POSITIONS = 48  # beyond the window that the scaled case was "first trained on"
TOKENS = torch.randint(13, (2, NUM_POSITIONS), generator=torch.Generator().manual_seed(1))


def logits_of(model, offset=1, tokens=TOKENS):
    padded = torch.nn.functional.pad(tokens, (0, model.num_offsets))
    state = model.hidden_states(padded, torch.zeros_like(padded))[offset]
    return model.unembedding.logits(offset, state)


@pytest.mark.parametrize(("case", "num_offsets"), some_of(product(CASES, (1, 4)), one_in=3))
def test_the_main_head_scores_as_in_transformers(case, num_offsets, tmp_path):
    judge = save_model(transformers, case, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=num_offsets))
    recipe, model = load_model(tmp_path / "ours")
    assert (recipe.heads.num_offsets, recipe.heads.kind, recipe.model.num_hidden_layers) == (num_offsets, "parallel", 3)
    expected = judge(TOKENS).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", some_of(CASES, one_in=3, first=1))
def test_the_export_of_an_import_is_the_folder_again(case, tmp_path):
    save_model(transformers, case, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=2))
    export_model(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(stored(tmp_path / "back"), stored(tmp_path / "hf"))
    before, after = (transformers.AutoConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("hf", "back"))
    assert after | {"_name_or_path": before["_name_or_path"]} == before
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    model = load_model(tmp_path / "ours")[1]
    torch.testing.assert_close(logits_of(model), again(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", some_of(CASES, one_in=3, first=2))
def test_settings_in_the_words_before_transformers_5_mean_the_same(case, tmp_path):
    save_model(transformers, case, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    (tmp_path / "ours" / SOURCE_CONFIG).unlink()  # as if it had been trained here from the beginning
    export_model(tmp_path / "ours", tmp_path / "back")
    assert "rope_parameters" not in json.loads((tmp_path / "back/config.json").read_text())
    import_folder(tmp_path / "back", tmp_path / "again", Wanted())
    assert load_model(tmp_path / "again")[0].model == load_model(tmp_path / "ours")[0].model


@pytest.mark.parametrize("case", ["llama3", "qwen3", "gpt_neox"])
def test_cached_decoding_says_what_transformers_says(case, tmp_path):
    judge = save_model(transformers, case, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=3))
    prompt = [1, 2, 3, 4, 5, 6]
    made = generate(load_model(tmp_path / "ours")[1], [prompt], max_new_tokens=40)
    said = judge.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert made.tokens[0] == said[0, len(prompt) :].tolist()
    assert made.statistics.num_accepted_tokens > 0


@pytest.mark.parametrize("case", ["llama", "gpt_neox"])
def test_shards_and_half_precision_keep_their_bits(case, tmp_path):
    save_model(transformers, case, tmp_path / "hf", dtype=torch.bfloat16, max_shard_size="2KB")
    assert len([*(tmp_path / "hf").glob("*.safetensors")]) > 3
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    assert {parameter.dtype for parameter in load_model(tmp_path / "ours")[1].parameters()} == {torch.bfloat16}
    export_model(tmp_path / "ours", tmp_path / "back", dtype="bf16")
    assert_same_tensors(stored(tmp_path / "back"), stored(tmp_path / "hf"))


def test_exported_modules_draft_as_often_in_transformers(tmp_path):
    """The importer's way round: modules of a folder, imported, exported, and run by transformers."""
    torch.manual_seed(0)
    modules = module_tensors("deepseek") | module_tensors("deepseek", 1)
    for name, value in modules.items():
        if name.endswith("eh_proj.weight"):  # lean on the token in between, as the trunk does: some drafts are right
            value[:, :WIDTH] += torch.eye(WIDTH)
    import_folder(write_folder(tmp_path / "hf", llama_tensors() | modules), tmp_path / "ours", Wanted())
    export_model(tmp_path / "ours", tmp_path / "back", "hf_mtp")

    class WithModules(transformers.LlamaForCausalLM):
        _keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\..*", r"model\.layers\.4\..*"]  # noqa: RUF012

    judge = WithModules.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    judge.generation_config.eos_token_id = None
    forwards = []
    judge.model.register_forward_hook(lambda *_: forwards.append(1))
    prompt = [1, 2, 3, 4, 5, 6, 7]
    made = generate(load_model(tmp_path / "ours")[1], [prompt], max_new_tokens=40)
    said = judge.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, use_mtp=True)
    assert made.tokens[0] == said[0, len(prompt) :].tolist()
    assert len(forwards) - 1 == len(made.statistics.accepted_by_row[0])
    assert 0 < made.statistics.num_accepted_tokens < made.statistics.num_draft_tokens
