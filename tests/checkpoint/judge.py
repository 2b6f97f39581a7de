"""What transformers computes with a folder, and what the import of it computes."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder

TOKENS = torch.randint(13, (2, 48), generator=torch.Generator().manual_seed(1))


def imported_logits(folder: Path, **wanted: Any) -> Tensor:
    """Import a folder with the next-token head alone and score TOKENS in fp32."""
    out = folder.parent / f"{folder.name}-ours"
    import_folder(folder, out, Wanted(num_offsets=1, **wanted))
    model = load_model(out, dtype=torch.float32)[1]
    padded = torch.nn.functional.pad(TOKENS, (0, 1))
    return model.unembedding.logits(1, model.hidden_states(padded, torch.zeros_like(padded))[1])


@torch.no_grad()
def judged_logits(transformers: Any, folder: Path, **how: Any) -> Tensor:
    """Score TOKENS with the model that transformers makes of a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    logits: Tensor = model(TOKENS).logits
    assert logits.std() > 0.1
    return logits


def edit(folder: Path, *removed: str, **changes: Any) -> None:
    """Change and remove settings of a folder."""
    path = folder / "config.json"
    told = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in told.items() if name not in removed}))
