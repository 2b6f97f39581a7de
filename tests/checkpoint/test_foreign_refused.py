"""Models that transformers knows, or does not, and that cannot come in: each refused by name, nothing written."""

import pytest

from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import CheckpointError
from tests.checkpoint.foreign import write_folder

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
DECODER = "must be a causal decoder"


@pytest.mark.parametrize(
    ("settings", "expected", "found"),
    [
        ({"model_type": "t5"}, DECODER, "t5, an encoder-decoder"),
        ({"model_type": "bart"}, DECODER, "bart, an encoder-decoder"),
        ({"model_type": "whisper"}, DECODER, "whisper, an encoder-decoder"),
        ({"model_type": "vit"}, DECODER, "no class that predicts the next token"),
        ({"model_type": "bert"}, "parts can be told apart", ""),
        ({"model_type": "rwkv"}, "parts can be told apart", ""),
        (
            {"model_type": "gemma4_text", "hidden_size_per_layer_input": 16},
            "parts can be told apart",
            "hidden_size_per_layer_input: 16",
        ),
        ({"model_type": "xlnet"}, "possible ones", "xlnet"),
        ({"model_type": "cwm", "bos_token_id": "none"}, "possible ones", "bos_token_id"),
        ({"model_type": "nowhere"}, f"transformers ({transformers.__version__}) must know", "'nowhere'"),
        ({"model_type": "nowhere", "auto_map": {"AutoModel": "x.Y"}}, "transformers' own, not a program", "auto_map"),
        ({"model_type": None, "architectures": ["XForCausalLM"]}, "must know the model", "null"),
        ({"model_type": "gemma2", "num_hidden_layers": 10**6}, "no more than the weights hold", "1,000,000"),
        ({"model_type": "gemma2", "layer_types": ["nothing"] * 3}, "possible ones", "layer_type"),
        ({"model_type": "gemma2", "hidden_activation": "nothing"}, "parts can be told apart", "nothing"),
        *(
            ({"model_type": kind, "quantization_config": {"quant_method": method}}, "plain fp32, bf16", method)
            for kind, method in (
                ("mixtral", "gptq"),
                ("gemma2", "awq"),
                ("deepseek_v3", "fp8"),
                ("phi3", "bitsandbytes"),
            )
        ),
    ],
)
def test_what_cannot_come_in_is_refused_by_name(settings, expected, found, tmp_path):
    folder = write_folder(tmp_path / "hf", **settings)
    with pytest.raises(CheckpointError) as failure:
        import_folder(folder, tmp_path / "ours", Wanted())
    assert expected in failure.value.expected
    assert found in failure.value.found
    assert failure.value.hint
    assert not (tmp_path / "ours").exists()
    assert [*tmp_path.glob("*.partial")] == []
